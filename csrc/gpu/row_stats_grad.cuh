// Loss and gradient of a row from one read of it (docs/design.md, One read): the row stays on the chip
// between its statistics and its gradient. This needs the whole vocabulary on this device, and the upstream
// gradient in forward.
//
// On NVIDIA, asynchronous copies bring the row into shared memory, of a cluster if one block's is too small;
// blocks of a cluster read each other's statistics there. A cluster takes several rows, one after the other:
// while it writes a gradient, each vector's place in shared memory already receives the next row's. On AMD
// the row stays in registers of up to 1024 lanes. Columns that do not fit are read twice; the second read
// usually hits L2. The columns that a thread takes, and their order, depend on neither dtype nor address, so
// the bits of the loss do not either.
#pragma once

#include <type_traits>

#include "merge.cuh"
#include "row_grad.cuh"
#include "row_stats.cuh"

namespace fsl::gpu {

// How blocks share a row, and how much of it they keep.
struct Holding {
  Divisor cluster;    // blocks per row
  int each;           // columns of a block's part
  int columns;        // columns that a block keeps in shared memory: its whole part, or whole tiles of it
  uint32_t clusters;  // of the launch
};

// The row that a block takes next.
struct Next {
  bool exists;
  Row row;
};

// Whether the clusters of a launch take all its rows in turn. Registers have no place for a second row, and
// rows that start at any address have no common places for their vectors.
template <bool kShifted>
constexpr bool kTakesRowsInTurn = !kUnalignedAccess && !kShifted;

// Registers per lane that hold logits.
constexpr int kHeldWords = 64;

// Adds kRuns vectors on the chip to the statistics. `there(r)` says whether vector r exists; the words of the
// others are -inf. Only smoothing needs the sum of the logits.
template <int kSoftcap, class T, class There>
FSL_DEVICE void held_tile(Running& s, uint32_t (&words)[kRuns][T::kWords], T, const There& there,
                          bool smoothing, const Units& z) {
  const auto eight = [&](float* x, int r) {
    FSL_UNROLL for (int i = 0; i < T::kWords; ++i) optimisation_barrier(words[r][i]);
    FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] = T::element(words[r], i);
  };
  const auto sum = [&](const float* x, int r) { return smoothing && there(r) ? sum_eight(x) : 0.0f; };
  accumulate<4, kSoftcap>(s, eight, sum, 0, 0, z);
}

template <class T>
FSL_DEVICE void nothing(uint32_t* words) {
  float x[8];
  FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] = -kInfinity;
  T::put(words, x);
}

// Columns [begin, end) of a row in shared memory: whole vectors, one after the other.
template <class T, int kSoftcap, bool kShifted>
struct HeldInShared {
  char* memory;
  int begin, end;

  FSL_DEVICE char* at(int column) const { return memory + (column - begin) * T::kBytes; }

  // The sum of the logits is always made: for a flag nvcc would make two loops of one.
  FSL_DEVICE HeldInShared(int begin, int end, int columns, bool)
      : memory(dynamic_shared()), begin(begin), end(end - begin < columns ? end : begin + columns) {}

  // Starts to load a row. A thread loads the vectors that its own statistics use, so it waits for no other
  // thread.
  FSL_DEVICE void bring(const Row& row) {
    FSL_UNROLL_BY(4)
    for (int column = begin + 8 * thread_id(); column < end; column += 8 * block_threads()) {
      if (!kShifted || chunks_inside<T, kShifted>(row, column, 8, row.skew)) bring_eight(row, column);
    }
    if (kShifted) {
      bring_by_ones(row, begin);
      if (end - begin > 8) bring_by_ones(row, end - 8);
    }
  }

  // Loads the vector at `column` logit by logit if one of its chunks reaches out of the row. Only the first
  // and the last vector can. The thread that owns the vector does it.
  FSL_DEVICE void bring_by_ones(const Row& row, int column) const {
    if (chunks_inside<T, kShifted>(row, column, 8, row.skew)) return;
    if (column < end && (column - begin) / 8 % block_threads() == thread_id())
      FSL_UNROLL_BY(1) for (int i = column; i < column + 8; ++i) T::put(at(i), load_one<T>(row, i));
  }

  FSL_DEVICE void bring_eight(const Row& row, int column) const {
    const char* from = row.start + int64_t{column} * T::kBytes;
    if (kShifted) {
      uint32_t words[T::kWords];
      load_eight<T, kShifted>(words, from, row.skew);
      store_eight<T>(at(column), words);
    } else {
      FSL_UNROLL for (int c = 0; c < T::kWords / 4; ++c) async_copy(at(column) + 16 * c, from + 16 * c);
    }
  }

  FSL_DEVICE void statistics(Running& s, const Units& z) const {
    const int stride = 8 * block_threads();
    async_wait();
    for (int first = begin + 8 * thread_id(); first < end; first += kRuns * stride) {
      const auto there = [&](int r) { return first + r * stride < end; };
      uint32_t words[kRuns][T::kWords];
      FSL_UNROLL for (int r = 0; r < kRuns; ++r) {
        if (there(r)) load_eight<T, false>(words[r], at(first + r * stride), 0);
        else nothing<T>(words[r]);
      }
      held_tile<kSoftcap>(s, words, T{}, there, true, z);
    }
  }

  // Adds columns [end, whole), which did not fit.
  FSL_DEVICE void rest(Running& s, const Row& row, int whole, const Units& z) const {
    s = RowStats<T, 4, kSoftcap, kShifted>::columns(row, end, whole, z, s);
  }

  FSL_DEVICE float one(int column) const {
    const uint32_t word = T::load(at(column));
    return T::element(&word, 0);
  }

  // Writes the gradient. If there is a next row, starts to load it, each vector into the place of the one
  // that this thread has just used.
  //
  // With kShifted the vectors of the gradient start at an aligned address, those of the logits at `begin`. So
  // a thread may need logits that other threads loaded, and there is no next row. They are complete, because
  // the block reduce of the statistics contains a barrier.
  FSL_DEVICE void gradient_to(const Row& out, const GradConstants& g, const Units& z,
                              const Next& next) const {
    const int aligned = kShifted ? aligned_column<T>(out, begin) : begin,
              first = aligned < end ? aligned : end;
    const int skew = (first - begin) * T::kBytes % 16, last = first + (end - first) / 8 * 8;
    for (int column = first + 8 * thread_id(); column < last; column += 8 * block_threads()) {
      uint32_t words[T::kWords];
      if (kShifted) load_shifted<T>(words, at(column), skew, load_chunk);
      else load_eight<T, false>(words, at(column), 0);
      float x[8];
      FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] = gradient<kSoftcap>(T::element(words, i), g, z, false);
      T::put(words, x);
      store_eight<T>(out.start + int64_t{column} * T::kBytes, words);
      if (!kShifted && next.exists) bring_eight(next.row, column);
    }
    if (!kShifted) return;
    // Up to seven columns before the whole vectors and up to seven after them, one thread each.
    const int before = begin + thread_id(), odd = before < first ? before : last + before - first;
    if (odd < end) T::put(out.start + int64_t{odd} * T::kBytes, gradient<kSoftcap>(one(odd), g, z, false));
  }
};

// Columns [begin, end) of a row, whole vectors, in the registers of the lanes that compute their statistics
// and gradient. Optimisation barriers make the compiler recompute addresses and fp32 logits; otherwise it
// would keep them in registers that should hold logits.
template <class T>
struct HeldInRegisters {
  static constexpr int kTiles = kHeldWords / T::kWords / kRuns;
  uint32_t words[kTiles][kRuns][T::kWords];
  int begin, end;
  bool smoothing;
  uint32_t lane;  // this lane's column relative to first()

  // The column of thread 0's vector. It is equal in all lanes, so it stays in scalar registers.
  FSL_DEVICE int first(int tile, int r) const { return begin + (tile * kRuns + r) * block_threads() * 8; }

  FSL_DEVICE void recompute_addresses() {
    optimisation_barrier(lane);
    optimisation_barrier_uniform(begin);
  }

  // Loads the vectors of a tile; `last` is where the columns end. A lane beyond `last` loads the last vector
  // instead: a branch would make it wait for each load. There must be at least one vector.
  FSL_DEVICE void load_tile(uint32_t (&to)[kRuns][T::kWords], const Row& row, int tile, int last) const {
    FSL_UNROLL for (int r = 0; r < kRuns; ++r) {
      const int mine = first(tile, r) + static_cast<int>(lane), column = mine < last - 8 ? mine : last - 8;
      load_eight<T, true>(to[r], row.start + int64_t{column} * T::kBytes, row.skew);
    }
  }

  FSL_DEVICE void tile_statistics(Running& s, uint32_t (&tile_words)[kRuns][T::kWords], int tile, int last,
                                  const Units& z) const {
    const auto there = [&](int r) { return static_cast<int>(lane) < last - first(tile, r); };
    if (first(tile + 1, 0) > last) {
      FSL_UNROLL for (int r = 0; r < kRuns; ++r) if (!there(r)) nothing<T>(tile_words[r]);
    }
    held_tile<kNoCap>(s, tile_words, T{}, there, smoothing, z);
  }

  FSL_DEVICE HeldInRegisters(int begin, int end, int, bool smoothing)
      : begin(begin), end(end), smoothing(smoothing), lane(8 * thread_id()) {
    const int most = first(kTiles, 0);
    if (most < end) this->end = most;
  }

  FSL_DEVICE void bring(const Row& row) {
    if (begin == end) return;
    FSL_UNROLL for (int tile = 0; tile < kTiles; ++tile) load_tile(words[tile], row, tile, end);
  }

  FSL_DEVICE void statistics(Running& s, const Units& z) {
    FSL_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      scheduling_barrier();
      recompute_addresses();
      tile_statistics(s, words[tile], tile, end, z);
    }
  }

  // Adds columns [end, whole), for which there were no registers.
  FSL_DEVICE void rest(Running& s, const Row& row, int whole, const Units& z) const {
    for (int tile = kTiles; first(tile, 0) < whole; ++tile) {
      uint32_t more[kRuns][T::kWords];
      load_tile(more, row, tile, whole);
      tile_statistics(s, more, tile, whole, z);
    }
  }

  FSL_DEVICE void gradient_to(const Row& out, const GradConstants& g, const Units& z, const Next&) {
    FSL_UNROLL for (int tile = 0; tile < kTiles; ++tile) FSL_UNROLL for (int r = 0; r < kRuns; ++r) {
      float x[8];
      scheduling_barrier();
      recompute_addresses();
      FSL_UNROLL for (int i = 0; i < T::kWords; ++i) optimisation_barrier(words[tile][r][i]);
      FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] =
          gradient<kNoCap>(T::element(words[tile][r], i), g, z, false);
      T::put(words[tile][r], x);
      if (static_cast<int>(lane) < end - first(tile, r))
        store_eight<T, true>(vector_at<T>(out, first(tile, r), lane), words[tile][r]);
    }
  }
};

// Adds one logit to `s`; -inf if there is none.
FSL_DEVICE void add_one(Running& s, float x, bool there, const Units& z) {
  const float top = max(s.top, x);
  const Reference reference = reference_of(not_minus_infinity(top), z);
  const float shrink = exp2(s.top * reference.unit_log2 - reference.rounded);
  s.total = fma(s.total, shrink, exp2(fma(x, reference.unit_log2, -reference.rounded)));
  s.x_sum += there ? x : 0.0f;
  s.top = top;
}

// Folds the statistics of the cluster's blocks, in the order of their parts. `turn` counts the rows of the
// cluster: two places in turn, because other blocks may still read those of the row before.
FSL_DEVICE Stats reduce_cluster(const Stats& mine, int cluster, int turn, float unit) {
  FSL_SHARED(float, parts, 8);
  float* part = parts + turn % 2 * 4;
  if (thread_id() == 0) store_stats<4>(part, mine);
  cluster_barrier();
  Stats all;
  for (int rank = 0; rank < cluster; ++rank) {
    float read[4];
    FSL_UNROLL for (int i = 0; i < 4; ++i) read[i] = i == kTarget ? 0.0f : cluster_read(part + i, rank);
    all = fold(all, load_stats<4>(read), unit);
  }
  return all;
}

// The rows of a launch that are scored, or those that are masked. A cluster takes every `clusters`-th of
// each: so all clusters get as many, wherever the masked rows lie. Each warp searches for itself.
struct RowsOf {
  const float* weight;
  uint32_t rows;
  bool scored;

  // The row with `skip` others of its kind between `from` and itself; `rows` if there is none.
  FSL_DEVICE uint32_t find(uint32_t from, uint32_t skip) const {
    for (; from < rows; from += kWarp) {
      const uint32_t mine = from + lane_id();
      const bool wanted = mine < rows && (weight[mine] != 0) == scored;
      const uint32_t all = ballot(wanted), before = all & ((1u << lane_id()) - 1);
      const uint32_t found = ballot(wanted && count_bits(before) == skip);
      if (found) return from + count_bits(found - 1);  // the number of lanes before the one that found it
      skip -= count_bits(all);
    }
    return rows;
  }
};

// The columns [begin, end) of each row that one block takes.
template <class T, int kSoftcap, bool kShifted>
struct Part {
  using Held = std::conditional_t<kUnalignedAccess, HeldInRegisters<T>, HeldInShared<T, kSoftcap, kShifted>>;
  // If loads and stores work at any address, one kernel serves all rows.
  static constexpr bool kAnyAddress = kShifted || kUnalignedAccess;
  using Statistics = RowStats<T, 4, kSoftcap, kAnyAddress>;
  using Gradient = GradWriter<T, kSoftcap, kAnyAddress>;

  const StatsGradArgs& a;
  const Units& z;
  int number, parts;
  int begin, whole, end;  // [whole, end) is no whole vector

  FSL_DEVICE Part(const StatsGradArgs& a, const Units& z, const Holding& holding, uint32_t number)
      : a(a), z(z), number(number), parts(holding.cluster.value) {
    const int valid = static_cast<int>(a.grad.logits.valid), each = holding.each;
    begin = this->number * each < valid ? this->number * each : valid;
    end = valid - begin < each ? valid : begin + each;
    whole = begin + (end - begin) / 8 * 8;
  }

  // Recomputed where needed: keeping them during the statistics costs registers that sm_100 lacks.
  FSL_DEVICE Row in(uint32_t n) const { return row_at<T>(a.grad.logits, n); }
  FSL_DEVICE Row out(uint32_t n) const { return row_at<T>(a.grad.grad, n); }
  FSL_DEVICE int own(uint32_t n) const {
    return own_column(a.grad.target[n], a.grad.math.vocab_start, a.grad.logits);
  }
  // The last block also writes the padding.
  FSL_DEVICE int until() const { return number == parts - 1 ? static_cast<int>(a.grad.grad.columns) : end; }
  FSL_DEVICE bool first() const { return number == 0 && thread_id() == 0; }

  FSL_DEVICE void masked_row(uint32_t n) const {
    Gradient::zero_columns(out(n), begin, until());
    if (!first()) return;
    a.loss[n] = 0.0f;
    store_normalizer(a.normalizer, n, 0.0f, 0.0f);
  }

  // `held` has started to load row n, the `turn`-th of this block.
  FSL_DEVICE void scored_row(uint32_t n, Held& held, int turn, const Next& next) const {
    // Read now, because in place the gradient overwrites it.
    const float x_own = broadcast_first_lane(own(n) < 0 ? 0.0f : load_one<T>(in(n), own(n)));
    const int odd = whole + thread_id();
    Running running;
    add_one(running, odd < end ? capped<kSoftcap>(load_one<T>(in(n), odd), z) : -kInfinity, odd < end, z);
    held.statistics(running, z);
    held.rest(running, in(n), whole, z);
    Stats all = Statistics::reduce_block(running, z, a.grad.math.vocab_start);
    if (parts > 1) all = reduce_cluster(all, parts, turn, z.unit);
    const float own_value = own(n) < 0 ? 0.0f : capped<kSoftcap>(x_own, z);
    const RowLoss row = row_loss(all, own_value, a.grad.target[n], z.unit, a.grad.math);
    if (first()) {
      a.loss[n] = row.loss * a.weight[n];
      store_normalizer(a.normalizer, n, row.top, row.total);
    }
    const float factor = factor_of(a.grad.factor, n);
    if (factor == 0) {
      Gradient::zero_columns(out(n), begin, until());
      if (next.exists) held.bring(next.row);
      return;
    }
    const GradConstants g = grad_constants<kSoftcap>(a.grad, z, n, factor, row.top, row.total);
    Gradient::any_columns(in(n), out(n), g, z, held.end, end);
    held.gradient_to(out(n), g, z, next);
    Gradient::zero_columns(out(n), end, until());
    barrier();  // its own logit is written over what another thread has written there
    if (thread_id() == 0 && own(n) >= begin && own(n) < end)
      T::put(out(n).start + int64_t{own(n)} * T::kBytes, gradient<kSoftcap>(x_own, g, z, true));
  }
};

// With kUnalignedAccess there is no softcap; see one_read_gains.
template <class T, int kSoftcap, bool kShifted>
FSL_KERNEL(FSL_VENDOR(512, 1024), 4)
row_stats_grad_kernel(StatsGradArgs a, Units z, Holding holding) {
  const Divided block = divide(block_id(), holding.cluster);
  const uint32_t cluster = block.quotient;
  const Part<T, kSoftcap, kShifted> part(a, z, holding, block.rest);
  typename Part<T, kSoftcap, kShifted>::Held held(part.begin, part.whole, holding.columns,
                                                  a.grad.math.label_smoothing > 0);
  if constexpr (kTakesRowsInTurn<kShifted>) {
    const uint32_t rows = static_cast<uint32_t>(a.grad.logits.batch * a.grad.logits.seq);
    const RowsOf scored{a.weight, rows, true}, masked{a.weight, rows, false};
    uint32_t n = scored.find(0, cluster);
    if (n < rows) held.bring(part.in(n));
    for (uint32_t m = masked.find(0, cluster); m < rows; m = masked.find(m + 1, holding.clusters - 1))
      part.masked_row(m);
    for (int turn = 0; n < rows; ++turn) {
      const uint32_t following = scored.find(n + 1, holding.clusters - 1);
      const bool exists = following < rows;
      part.scored_row(n, held, turn, {exists, part.in(exists ? following : n)});
      n = following;
    }
  } else {
    if (a.weight[cluster] == 0) return part.masked_row(cluster);
    held.bring(part.in(cluster));
    part.scored_row(cluster, held, 0, {});
  }
  if (part.parts > 1) cluster_barrier();  // other blocks may still read this block's statistics
}

}  // namespace fsl::gpu
