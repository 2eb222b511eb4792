// Are all bytes within their columns' alphabets? Asked before an operator uses them as an index.
#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" {

// Index of the first of rows x columns bytes that exceeds the largest value of its column; -1 if none does.
int64_t sid_outside(const uint8_t* data, int64_t rows, int64_t columns, const uint8_t* largest) {
  const int64_t size = rows * columns, step = columns * 32;  // a pattern that compares whole vectors
  std::vector<uint8_t> pattern(step);
  for (int64_t k = 0; k < step; k++) pattern[k] = largest[k % columns];
  for (int64_t at = 0; at < size; at += step) {
    const int64_t n = std::min(step, size - at);
    uint8_t bad = 0;
    for (int64_t k = 0; k < n; k++) bad |= data[at + k] > pattern[k];
    for (int64_t k = 0; bad && k < n; k++)
      if (data[at + k] > pattern[k]) return at + k;
  }
  return -1;
}
}
