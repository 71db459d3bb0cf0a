// The primitives' kernels, emulated, for ctypes. `run` returns what went wrong, or nothing.
#include "primitives.h"

#include <exception>
#include <string>

#include "simt/launch.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int count() { return fastvit::primitive_count(); }
EXPORT const char* name(int which) { return fastvit::primitive_name(which); }
EXPORT int input_bytes(int which) { return fastvit::primitive_input_bytes(which); }
EXPORT int output_bytes(int which) { return fastvit::primitive_output_bytes(which); }

EXPORT const char* run(int which, const void* input, void* output, int capability, uint64_t seed) {
  static std::string message;
  message.clear();
  simt::host::GlobalMemory& memory = simt::host::global_memory();
  memory.clear();
  memory.add_input("input", input, input_bytes(which));
  memory.add_output("output", output, output_bytes(which));
  simt::Queue queue;
  queue.capability = capability;
  queue.seed = seed;
  try {
    fastvit::run_primitive(which, input, output, queue);
    memory.check_all_written();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
