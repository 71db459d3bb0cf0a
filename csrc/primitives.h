// The primitives one by one, each in a kernel of its own, from bytes to bytes, so that what the emulation takes PTX to
// mean can be held to a GPU. Any bytes are an input: where sums must not depend on their order, small integers are made
// of them.
#pragma once

#include "simt/queue.h"

namespace fastvit {

using simt::Queue;

int primitive_count();
const char* primitive_name(int which);  // 0 to primitive_count() - 1, here and below
int primitive_input_bytes(int which);
int primitive_output_bytes(int which);

// Whether the queue's device has the primitive: wgmma, clusters and setmaxnreg are here of capability 9.0 alone.
bool has_primitive(int which, const Queue& queue);

// Both addresses are aligned to 16 bytes. Throws std::invalid_argument where the device has no such primitive.
void run_primitive(int which, const void* input, void* output, const Queue& queue);

}  // namespace fastvit
