// Clusters, mbarriers and bulk copies, emulated. A bulk copy arrives at any time between its start and the end of the
// phase that counts its bytes, in each block on its own.
#pragma once

#include "primitives.h"

namespace simt {

SIMT_DEVICE int cluster_rank() { return host::cluster().rank(); }
SIMT_DEVICE void sync_cluster() { host::cluster().sync_cluster(); }

SIMT_DEVICE void mbarrier_init(shared_address mbarrier, int arrivals) {
  host::cluster().start_mbarrier(mbarrier, arrivals);
}
SIMT_DEVICE void mbarrier_publish() { host::cluster().publish_mbarriers(); }
SIMT_DEVICE void mbarrier_arrive(shared_address mbarrier) {
  host::cluster().arrive(host::cluster().rank(), mbarrier);
}
SIMT_DEVICE void mbarrier_arrive(shared_address mbarrier, int rank) { host::cluster().arrive(rank, mbarrier); }
SIMT_DEVICE void mbarrier_expect(shared_address mbarrier, int bytes) { host::cluster().expect(mbarrier, bytes); }
SIMT_DEVICE void mbarrier_wait(shared_address mbarrier, int parity) { host::cluster().wait_for(mbarrier, parity); }

SIMT_DEVICE void copy_bulk(shared_address target, const void* source, int bytes, shared_address mbarrier, int ranks) {
  if (target % 16 || bytes % 16) host::fail("misaligned bulk copy");
  const auto* from = static_cast<const unsigned char*>(source);
  for (int byte = 0; byte < bytes; byte += 16) host::global_memory().check_read(from + byte, 16);
  const int issuer = host::cluster().rank();
  for (int rank = 0; rank < host::cluster().size(); rank++) {
    if (ranks >> rank & 1) host::cluster().start_bulk_copy({rank, issuer, target, mbarrier, from, bytes});
  }
  if (ranks >> host::cluster().size()) host::fail("a bulk copy to a block outside the cluster");
}

}  // namespace simt
