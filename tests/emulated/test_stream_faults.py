"""Faults planted in the stream of patch_embed: its mbarriers, its warps' roles, and the weights that blocks share."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation import PatchEmbedCase
from tests.emulated.planted import Cases, Fault, Switched

STREAM, HOPPER = "patch_embed_sm90a", {"processors": 1, "capability": 90}

# Pixels that are converted, tiles of one step, pixels that are copied, and several rows of the prefix's tiles.
CASES: Cases = tuple(
    (case, torch.bfloat16, HOPPER)
    for case in (
        PatchEmbedCase("converted", batch=8, grid=(7, 7), patch=(8, 8), channels=7, width=200, images="uint8",
                       normalise=True),
        PatchEmbedCase("short", batch=8, grid=(7, 7), patch=(8, 8), channels=1, width=200, images="uint8"),
        PatchEmbedCase("copied", batch=8, grid=(7, 7), patch=(8, 8), channels=5, width=200),
        PatchEmbedCase("prefix", batch=2, grid=(7, 7), patch=(8, 8), channels=3, width=200, prefix=200),
    )
)  # fmt: skip

AWAIT_FULL = "simt::mbarrier_wait(Memory::full(i), Memory::parity(i));"
AWAIT_EMPTY = "simt::mbarrier_wait(Memory::empty(i), !Memory::parity(i));"
HAND_OVER = "if (simt::thread_index() % 32 == 0) simt::mbarrier_arrive(Memory::full(i));"
RELEASE = "if (lane < CLUSTER) simt::mbarrier_arrive(Memory::empty(i), lane);"
START_FULL, START_EMPTY = "simt::mbarrier_init(full(stage), FILLING);", "simt::mbarrier_init(empty(stage), EMPTYING);"
PUBLISH = "simt::publish_shared();\n    simt::sync_warp();"
START = "if (simt::thread_index() == 0) StreamMemory<Tile>::start_mbarriers();\n  simt::sync_cluster();"
END = "// A block that has ended has no shared memory to reach into.\n  simt::sync_cluster();"
SOURCE, TARGET = "static_cast<const unsigned char*>(weight) + offset", "Memory::stage(i) + Tile::FIRST_BYTES"
CONSTANTS = "Copier::normaliser_of(p, k)"
EXPECT = "simt::mbarrier_expect(Memory::full(i), WEIGHT_BYTES);"
REQUEST = "simt::request_registers<Role::CONSUMER_REGISTERS>();"
GIVE = "simt::release_registers<Role::PRODUCER_REGISTERS>();"

FAULTS = tuple(
    Fault(name, STREAM, "patch_embed_stream.h", old, new, caught_by)
    for name, old, new, caught_by in (
        # Full
        ("a full stage not waited for", AWAIT_FULL, "", "shared word"),
        ("a full stage waited for by a thread", AWAIT_FULL, f"if (!simt::thread_index()) {AWAIT_FULL}", "shared word"),
        ("a full stage of the phase before", AWAIT_FULL, AWAIT_FULL.replace("Memory::p", "!Memory::p"), "shared word"),
        ("an arrival too few fills", START_FULL, "simt::mbarrier_init(full(stage), FILLING - 1);", "arrivals"),
        ("an arrival too many fills", START_FULL, "simt::mbarrier_init(full(stage), FILLING + 1);", "deadlock"),
        ("a warp hands nothing over", HAND_OVER, f"if (simt::thread_index() < 480) {HAND_OVER}", "deadlock"),
        ("each thread hands over", HAND_OVER, "simt::mbarrier_arrive(Memory::full(i));", "shared word"),
        ("handed over without the warp", PUBLISH, "simt::publish_shared();", "race"),
        ("handed over unpublished", PUBLISH, "simt::sync_warp();", "fence.proxy.async"),
        ("published behind the warp's barrier", PUBLISH, "simt::sync_warp(); simt::publish_shared();", "fence.proxy"),
        ("handed over while copies are in flight", "simt::copy_wait<PENDING>();", "simt::copy_wait<PENDING + 1>();",
         "shared word"),
        ("the last steps not handed over", "all > AHEAD ? all - AHEAD : 0", "all", "deadlock"),
        ("copies never committed", "simt::copy_commit();", "", "cop"),
        # Empty
        ("an empty stage not waited for", AWAIT_EMPTY, "", "arrivals"),
        ("an empty stage waited for by a thread", AWAIT_EMPTY, f"if (thread == 0) {AWAIT_EMPTY}", "arrivals"),
        ("an empty stage of the phase before", AWAIT_EMPTY, AWAIT_EMPTY.replace("!", ""), "deadlock"),
        ("an arrival too few empties", START_EMPTY, "simt::mbarrier_init(empty(stage), EMPTYING - 1);", "race"),
        ("an arrival too many empties", START_EMPTY, "simt::mbarrier_init(empty(stage), EMPTYING + 1);", "deadlock"),
        ("released while it is multiplied", "if (step > 0) release(i - 1);", "release(i);", "while a wgmma"),
        ("the last of a tile not released", "product.finish();\n    release(i - 1);", "product.finish();", "deadlock"),
        ("the other block not told", RELEASE, RELEASE.replace("<", "== simt::cluster_rank() && lane <"), "deadlock"),
        ("the other block not waited for", RELEASE, RELEASE.replace(", lane)", ", simt::cluster_rank())"), "race"),
        # Weights
        ("half of the bytes expected", EXPECT, EXPECT.replace("WEIGHT_BYTES", "SHARE"), "shared word"),
        ("more bytes expected than come", EXPECT, EXPECT.replace("WEIGHT", "2 * WEIGHT"), "deadlock"),
        ("no bytes expected", EXPECT, "simt::mbarrier_arrive(Memory::full(i));", "in flight"),
        ("weights for the block alone", "(1 << CLUSTER) - 1", "1 << simt::cluster_rank()", "deadlock"),
        ("the other block's share", f"{TARGET} + share", TARGET, "race"),
        ("a share in another place", SOURCE, f"{SOURCE} + SHARE - 2 * share", "value"),
        ("columns of the first tile", "order.column(tile) * steps", "0 * steps", "value"),
        ("weights of the tile before", "if (++step == steps) step = 0, tile += order.clusters;",
         "if (++step == steps) step = 0, tile += all - i > steps ? 0 : order.clusters;", "value"),
        # Pixels
        ("origins over those still read", "// The tile before is loaded.\n    simt::sync_warp();", "", "race"),
        ("origins read before they are noted", "// This one can be.\n    simt::sync_warp();", "", "shared word"),
        ("rows of the tile before", "patch_origin(p, first_row + noted)",
         "patch_origin(p, order.first_row(0) + noted)", "value"),
        ("rows of the other block", "tile / tiles_n * CLUSTER + simt::cluster_rank()", "tile / tiles_n * CLUSTER",
         "second write"),
        ("a pass of the step before", "(pass + HELD) % PASSES", "pass / 2 * 2", "value"),
        ("constants of the first step", CONSTANTS, CONSTANTS.replace("k)", "k % Tile::BK)"), "value"),
        # The block
        ("mbarriers not published", "simt::mbarrier_publish();", "", "mbarrier_init"),
        ("no barrier behind the mbarriers", START, START.replace("cluster();", "threads();"), "initialised"),
        ("a block ends before the other", END, "", "block"),
        ("registers not released", GIVE, "", "deadlock"),
        ("too few registers released", GIVE, GIVE.replace(">(", " + 8>("), "deadlock"),
        ("registers not given up but asked for", GIVE, GIVE.replace("release", "request"), "that a thread has"),
        ("too many registers requested", REQUEST, REQUEST.replace(">(", " + 8>("), "deadlock"),
        ("registers for one warp of four", REQUEST, f"if (simt::thread_index() % 128 < 32) {REQUEST}", "operation"),
        ("sums over loads", "simt::shared_base() + Memory::SLABS", "simt::shared_base()", "race"),
        ("the prefix by as many threads as a tile's", "copy_prefix_tile<Tile, Role::THREADS>", "copy_prefix_tile<Tile>",
         "second write"),
    )
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(planted: Switched, fault: Fault) -> None:
    planted.expect_caught(fault, CASES)


def test_without_a_fault_all_is_well(planted: Switched) -> None:
    assert planted.outcome(CASES) == ""
