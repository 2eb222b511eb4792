// Work shared out among threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Run `loop(thread, next)` on up to `threads` threads; each takes items by calling next() until it returns
// `items` or more. `work` counts table rows or the like: small calls stay on this thread, since starting
// another costs about as much as ten thousand of them.
template <typename Loop>
void run_parallel(int64_t threads, int64_t items, int64_t work, Loop loop) {
  std::atomic<int64_t> taken{0};
  auto next = [&] { return taken++; };
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min({threads, items, 1 + work / 20000});
  try {
    for (int64_t t = 1; t < wanted; t++) helpers.emplace_back(loop, t, next);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  loop(0, next);
  for (auto& helper : helpers) helper.join();
}
