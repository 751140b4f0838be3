// What the text of our kernel takes from Metal, for a C++ compiler: address spaces, types, barriers and shuffles. A
// threadgroup's threads are real ones; threadgroups run one after the other.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#define device
#define constant
#define threadgroup static

typedef unsigned int uint;
struct uint3 {
  uint x, y, z;
};

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = static_cast<uint16_t>(std::isnan(value) ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};
typedef _Float16 float16_t;

namespace metal {
enum class mem_flags { mem_threadgroup };

static pthread_barrier_t all_threads;
static std::vector<pthread_barrier_t> simdgroups;
static std::vector<float> shuffled;
static thread_local uint own_id;

inline float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}

inline void threadgroup_barrier(mem_flags) {
  pthread_barrier_wait(&all_threads);
}

inline float simd_shuffle_xor(float value, uint16_t mask) {
  shuffled[own_id] = value;
  pthread_barrier_wait(&simdgroups[own_id / 32]);
  float other = shuffled[own_id ^ mask];
  pthread_barrier_wait(&simdgroups[own_id / 32]);
  return other;
}
} // namespace metal

template <typename Kernel>
void dispatch(uint groups, uint threads, Kernel run) {
  metal::shuffled.resize(threads);
  metal::simdgroups.resize(threads / 32);
  pthread_barrier_init(&metal::all_threads, nullptr, threads);
  for (auto& barrier : metal::simdgroups) {
    pthread_barrier_init(&barrier, nullptr, 32);
  }
  for (uint group = 0; group < groups; group++) {
    std::vector<std::thread> started;
    for (uint id = 0; id < threads; id++) {
      started.emplace_back([=] {
        metal::own_id = id;
        run(uint3{id, 0, 0}, uint3{group, 0, 0});
      });
    }
    for (auto& one : started) {
      one.join();
    }
  }
}

inline size_t size_of(const char* name) {
  std::ifstream file(name, std::ios::binary | std::ios::ate);
  return static_cast<size_t>(file.tellg());
}

inline const void* contents(const char* name) {
  size_t size = size_of(name);
  char* data = new char[size];
  std::ifstream(name, std::ios::binary).read(data, static_cast<std::streamsize>(size));
  return data;
}

inline void save(const char* name, const void* data, size_t size) {
  std::ofstream(name, std::ios::binary).write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
}

// Words of Metal's: a variable of such a name does not compile here either.
#define thread
#define kernel
#define half
