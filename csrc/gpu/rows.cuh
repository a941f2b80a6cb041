// The address of a row, and loads and stores of eight neighbouring logits: 16 bytes at a time, at any
// alignment.
#pragma once

#include "row_math.cuh"

namespace fsl::gpu {

// Vectors of eight logits that a thread loads at once, so that independent 16-byte loads are in flight.
constexpr int kRuns = 4;

// A row of logits or of their gradient. It starts `skew` bytes past a multiple of 16.
struct Row {
  char* start;
  int64_t bytes;
  int skew;
};

struct Divided {
  uint32_t quotient, rest;
};

FSL_DEVICE Divided divide(uint32_t n, const Divisor& by) {
  const uint32_t quotient = static_cast<uint32_t>(uint64_t{2 * n} * by.multiplier >> 32) >> by.shift;
  return {quotient, n - quotient * by.value};
}

template <class T>
FSL_DEVICE Row row_at(const Rows& rows, uint32_t n) {
  const Divided at = divide(n, rows.by_seq);
  char* start =
      static_cast<char*>(rows.data) + (at.quotient * rows.stride_b + at.rest * rows.stride_s) * T::kBytes;
  return {start, rows.columns * T::kBytes, static_cast<int>(reinterpret_cast<uintptr_t>(start) & 15)};
}

// Loads the kWords words at `at`, `skew` bytes past a multiple of 16: loads the aligned chunks that contain
// them and shifts. The shift is the same for a whole row. The L1 cache serves the second load of a chunk.
template <class T, class Load>
FSL_DEVICE void load_shifted(uint32_t* words, const char* at, int skew, const Load& load) {
  constexpr int kChunks = T::kWords / 4;
  uint32_t from[4 * kChunks + 4];
  FSL_UNROLL for (int c = 0; c <= kChunks; ++c) {
    const Chunk chunk = load(at - skew + 16 * c);
    FSL_UNROLL for (int i = 0; i < 4; ++i) from[4 * c + i] = chunk.word[i];
  }
  FSL_UNROLL for (int i = 0; i < 4 * kChunks + 2; ++i) from[i] = skew & 8 ? from[i + 2] : from[i];
  FSL_UNROLL for (int i = 0; i < 4 * kChunks + 1; ++i) from[i] = skew & 4 ? from[i + 1] : from[i];
  FSL_UNROLL for (int i = 0; i < T::kWords; ++i) words[i] =
      T::kBytes == 4 ? from[i] : funnel_right(from[i + 1], from[i], skew % 4 * 8);
}

template <bool kUnaligned>
FSL_DEVICE Chunk load_chunk_at(const char* at) {
  if constexpr (kUnaligned) return load_chunk_unaligned(at);
  else return load_chunk(at);
}

// With kShifted the address is `skew` bytes past a multiple of 16; without, it is a multiple of 16.
template <class T, bool kShifted>
FSL_DEVICE void load_eight(uint32_t* words, const char* at, int skew) {
  if constexpr (kShifted && !kUnalignedAccess) {
    load_shifted<T>(words, at, skew, load_chunk_volatile);
  } else {
    FSL_UNROLL for (int c = 0; c < T::kWords / 4; ++c) {
      const Chunk chunk = load_chunk_at<kShifted>(at + 16 * c);
      FSL_UNROLL for (int i = 0; i < 4; ++i) words[4 * c + i] = chunk.word[i];
    }
  }
}

// kUnaligned: see kUnalignedAccess.
template <class T, bool kUnaligned = false>
FSL_DEVICE void store_eight(char* at, const uint32_t* words) {
  FSL_UNROLL for (int c = 0; c < T::kWords / 4; ++c) {
    const Chunk chunk{{words[4 * c], words[4 * c + 1], words[4 * c + 2], words[4 * c + 3]}};
    if constexpr (kUnaligned) store_chunk_unaligned(at + 16 * c, chunk);
    else store(at + 16 * c, chunk);
  }
}

// Whether neighbouring lanes trade halves of their vectors before a store. A vector of fp32 is two chunks, so
// each store of a warp would leave out every other 16 bytes; after the trade it fills 32-byte sectors.
// Measured on an H100: the gradient of fp32 logits takes 0.76 ms with the trade and 0.93 ms without, 95 and
// 78 % of the bandwidth of a copy.
template <class T, bool kShifted>
constexpr bool kTrades = T::kBytes == 4 && !kShifted && !kUnalignedAccess;

// store_eight for all lanes of a warp together. Their vectors must lie one after the other.
template <class T, bool kShifted>
FSL_DEVICE void store_eight_of_warp(char* at, const uint32_t* words) {
  if constexpr (kTrades<T, kShifted>) {
    // The even lane of a pair stores the first halves of both vectors, the odd lane the second halves.
    const int half = thread_id() % 2;
    Chunk even, odd;
    FSL_UNROLL for (int i = 0; i < 4; ++i) {
      const uint32_t theirs = shuffle_xor(half ? words[i] : words[4 + i], 1);
      even.word[i] = half ? theirs : words[i];
      odd.word[i] = half ? words[4 + i] : theirs;
    }
    char* first = at - 16 * half;
    store(first, even);
    store(first + 32, odd);
  } else {
    store_eight<T>(at, words);
  }
}

// Whether all chunks that load_eight loads for logits [column, column + count) lie in the row.
template <class T, bool kShifted>
FSL_DEVICE bool chunks_inside(const Row& row, int64_t column, int64_t count, int skew) {
  const int64_t begin = column * T::kBytes, end = begin + count * T::kBytes;
  return end <= row.bytes &&
         (!kShifted || kUnalignedAccess || (begin >= skew && end + 16 - skew <= row.bytes));
}

// The target's column in this shard; -1 if another shard holds it or it is not a vocabulary id.
FSL_DEVICE int own_column(int64_t target, int64_t vocab_start, const Rows& rows) {
  const int64_t own = target - vocab_start;
  return target >= 0 && own >= 0 && own < rows.valid ? static_cast<int>(own) : -1;
}

// The address of column `column + mine`, where `column` is equal in all threads. Base and offset are separate
// terms, because the memory instructions take them separately.
template <class T>
FSL_DEVICE char* vector_at(const Row& row, int column, uint32_t mine) {
  return row.start + int64_t{column} * T::kBytes + uint64_t{mine * T::kBytes};
}

// The first column, from `column` on, whose address is a multiple of 16.
template <class T>
FSL_DEVICE int aligned_column(const Row& row, int column) {
  const int past = (row.skew + column % 16 * T::kBytes) % 16;
  return column + (16 - past) % 16 / T::kBytes;
}

// One logit in fp32.
template <class T>
FSL_DEVICE float load_one(const Row& row, int64_t column) {
  const uint32_t word = T::load(row.start + column * T::kBytes);
  return T::element(&word, 0);
}

}  // namespace fsl::gpu
