// Work shared out among PyTorch's threads.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

// The OpenMP runtime that PyTorch has loaded, whichever it is (GNU's, LLVM's and Intel's all have this entry),
// or null. Its threads are the ones to use: after a matrix product they spin for a while and would take the
// processors from threads of our own.
inline auto openmp_parallel() {
  typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return parallel;
}

// Run `loop(thread, next)` on up to `threads` threads (on this one where there is no OpenMP); each takes items by
// calling next() until it returns `items` or more. `work` counts table rows or the like: small calls stay on
// this thread, since waking another costs about as much as ten thousand of them.
template <typename Loop>
void run_parallel(int64_t threads, int64_t items, int64_t work, Loop loop) {
  std::atomic<int64_t> taken{0}, started{0};
  auto body = [&] { loop(started++, [&] { return taken++; }); };
  const int64_t wanted = std::min({threads, items, 1 + work / 20000});
  const auto parallel = openmp_parallel();
  if (wanted <= 1 || !parallel) return body();
  parallel([](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body, static_cast<unsigned>(wanted), 0);
}
