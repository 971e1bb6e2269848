// Launches that are listed instead of run: at sizes whose tensors nobody has. While it is on, launch functions may be
// given any pointers, and scratch memory is counted and not there.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

struct Launch {
  void* kernel;
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
};

struct Recording {
  bool on = false;
  std::vector<Launch> launches;
  int64_t scratch_bytes = 0;
};
inline Recording recording;

// Floats of one value; of a recording only their count.
class Scratch {
 public:
  Scratch(int64_t bytes, float value) {
    if (recording.on) {
      recording.scratch_bytes += bytes;
    } else {
      memory_.assign(static_cast<size_t>(bytes) / sizeof(float), value);
    }
  }
  float* data() { return memory_.data(); }

 private:
  std::vector<float> memory_;
};

}  // namespace emulator
