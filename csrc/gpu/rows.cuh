// Where a row lies, and eight neighbouring logits of it: 16 bytes at a time, wherever the row starts.
#pragma once

#include "row_math.cuh"

namespace fsl::gpu {

// Vectors of eight logits that a thread takes in at once: independent 16-byte loads in flight.
constexpr int kRuns = 4;

// A row of logits or of their gradient. `skew` is how many bytes it starts past a multiple of 16.
struct Row {
  char* start;
  int64_t bytes;
  int skew;
};

template <class T>
FSL_DEVICE Row row_at(const Rows& rows, uint32_t n) {
  const uint32_t seq = static_cast<uint32_t>(rows.seq);
  char* start =
      static_cast<char*>(rows.data) + (n / seq * rows.stride_b + n % seq * rows.stride_s) * T::kBytes;
  return {start, rows.columns * T::kBytes, static_cast<int>(reinterpret_cast<uintptr_t>(start) & 15)};
}

// The kWords words at `at`, which lies `skew` bytes past a multiple of 16: of the chunks that hold them,
// shifted into place. The shift is the same for a whole row, and second loads of a chunk are served by the L1
// cache.
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

// kShifted: the address may be anything, `skew` bytes past a multiple of 16. Otherwise it is a multiple.
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

// Whether neighbouring lanes trade halves of their vectors, so that what a warp stores at once fills 32-byte
// sectors: of fp32 each lane alone would store every other 16 bytes. Measured on an H100: the gradient of
// fp32 logits takes 0.76 ms so and 0.93 ms otherwise, at 95 and 78 % of what a copy moves.
template <class T, bool kShifted>
constexpr bool kTrades = T::kBytes == 4 && !kShifted && !kUnalignedAccess;

// store_eight by all lanes of a warp together, whose vectors lie one after the other.
template <class T, bool kShifted>
FSL_DEVICE void store_eight_of_warp(char* at, const uint32_t* words) {
  if constexpr (kTrades<T, kShifted>) {
    // Of both vectors an even lane stores the first half, its neighbour the second.
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

// Whether the chunks that load_eight takes for logits [column, column + count) all lie in the row.
template <class T, bool kShifted>
FSL_DEVICE bool chunks_inside(const Row& row, int64_t column, int64_t count, int skew) {
  const int64_t begin = column * T::kBytes, end = begin + count * T::kBytes;
  return end <= row.bytes &&
         (!kShifted || kUnalignedAccess || (begin >= skew && end + 16 - skew <= row.bytes));
}

// The column of a target here, -1 when there is none: it is another shard's, or no vocabulary id.
FSL_DEVICE int own_column(int64_t target, int64_t vocab_start, const Rows& rows) {
  const int64_t own = target - vocab_start;
  return target >= 0 && own >= 0 && own < rows.valid ? static_cast<int>(own) : -1;
}

// Column `column`, the same for all threads, + `mine`: base and offset apart, as instructions take them.
template <class T>
FSL_DEVICE char* vector_at(const Row& row, int column, uint32_t mine) {
  return row.start + int64_t{column} * T::kBytes + uint64_t{mine * T::kBytes};
}

// The first column from `column` on at a multiple of 16 bytes.
template <class T>
FSL_DEVICE int aligned_column(const Row& row, int column) {
  const int past = (row.skew + column % 16 * T::kBytes) % 16;
  return column + (16 - past) % 16 / T::kBytes;
}

// fp32 of one logit.
template <class T>
FSL_DEVICE float load_one(const Row& row, int64_t column) {
  const uint32_t word = T::load(row.start + column * T::kBytes);
  return T::element(&word, 0);
}

}  // namespace fsl::gpu
