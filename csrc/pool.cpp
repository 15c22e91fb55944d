// The tokens are walked in the order they lie in memory and each is read from DRAM once. Four
// tokens of a role are reduced together, so that the accumulators, which stay in L1 or L2, are
// touched once for four. A walk by blocks of columns reads half as fast: the prefetchers follow
// rows.
//
// The batch is one line of batch * tokens positions, cut evenly over the threads wherever the cuts
// fall. A sample that a cut divides is reduced in parts and put together after the walk.
#include "pool.h"

#include <omp.h>

#include "simd.h"

namespace geofast::GEOFAST_ISA {
namespace {

using std::ptrdiff_t;

constexpr int kGroup = 4;  // 8 are slower: more streams of addresses than the prefetchers follow
// Tokens summed in float32 before the sum is added in float64. It bounds the rounding error of a
// mean of any length at that of a sum of 64.
constexpr int kFlush = 64;

// What has been seen of one sample's tokens of one role.
template <class E>
struct Accumulator {
    void (*reduce_group)(const E* const* rows, const E* const* next, Accumulator&, ptrdiff_t dim);
    void (*reduce_one)(const E* const* rows, const E* const* next, Accumulator&, ptrdiff_t dim);
    double* total;
    float *partial, *max, *min;
    int64_t* count;
    int pending, in_partial;
    const E* rows[2 * kGroup];  // not reduced yet: a group waits until the one after it is known
};

template <class E, unsigned kOps, int kRows>
inline void reduce_vector(const Floats (&x)[kRows], Accumulator<E>& a, ptrdiff_t c) {
    Floats sum = x[0], max = x[0], min = x[0];
    Ints nan = {};
    if constexpr (kRows == kGroup) {
        sum = (x[0] + x[1]) + (x[2] + x[3]);
        max = max_or_second(max_or_second(x[0], x[1]), max_or_second(x[2], x[3]));
        min = min_or_second(min_or_second(x[0], x[1]), min_or_second(x[2], x[3]));
        nan = unordered(x[0], x[1]) | unordered(x[2], x[3]);
    } else {
        nan = unordered(x[0], x[0]);
    }
    // An accumulator that is NaN stays so because it is the second operand.
    if constexpr ((kOps & kPoolMean) != 0) store(a.partial + c, load(a.partial + c) + sum);
    if constexpr ((kOps & kPoolMax) != 0) store(a.max + c, (Floats)((Ints)max_or_second(max, load(a.max + c)) | nan));
    if constexpr ((kOps & kPoolMin) != 0) store(a.min + c, (Floats)((Ints)min_or_second(min, load(a.min + c)) | nan));
}

// Reduces a group of rows and prefetches the next one. Without that the loads of a group wait for
// DRAM while nothing is computed: mean in float32 takes 1.1 times as long, in bfloat16 1.5 times.
template <class E, unsigned kOps, int kRows>
void reduce(const E* const* rows, const E* const* next, Accumulator<E>& a, ptrdiff_t dim) {
    constexpr ptrdiff_t kLine = 64 / sizeof(E);
    const E *row[kRows], *ahead[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows[i], ahead[i] = next[i];
    Floats x[kRows];
    ptrdiff_t c = 0;
    for (; c + kLine <= dim; c += kLine) {
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(ahead[i] + c);
        for (ptrdiff_t v = c; v < c + kLine; v += kFloats) {
            for (int i = 0; i < kRows; ++i) x[i] = load(row[i] + v);
            reduce_vector<E, kOps, kRows>(x, a, v);
        }
    }
    for (; c < dim; c += kFloats) {  // the accumulators are padded, the rows are not
        const ptrdiff_t n = dim - c;
        for (int i = 0; i < kRows; ++i) x[i] = n < kFloats ? load_part(row[i] + c, n) : load(row[i] + c);
        reduce_vector<E, kOps, kRows>(x, a, c);
    }
}

template <class E, unsigned kOps>
void choose_reduce(Accumulator<E>& a) {
    a.reduce_group = reduce<E, kOps, kGroup>;
    a.reduce_one = reduce<E, kOps, 1>;
}

// The accumulators of one sample in one slot of the scratch, for every role that has reductions.
template <class E>
class Sample {
public:
    Sample(const PoolArgs& args, ptrdiff_t slot) : args_(args) {
        float* p = args.scratch + slot * args.scratch_size;
        auto* counts = reinterpret_cast<int64_t*>(p);
        p += 16;
        for (int bit = 0; bit < 8; ++bit) {
            if (args.reductions[bit] == 0) continue;
            wanted_ |= 1u << bit;
            roles_[used_] = static_cast<uint8_t>(1u << bit);
            Accumulator<E>& a = accumulators_[used_++];
            a.total = reinterpret_cast<double*>(p);
            a.partial = p + 2 * args.dim_padded;
            a.max = p + 3 * args.dim_padded;
            a.min = p + 4 * args.dim_padded;
            a.count = counts + bit;
            a.pending = a.in_partial = 0;
            p += 5 * args.dim_padded;
            switch (args.reductions[bit]) {
                case 1:
                    choose_reduce<E, 1>(a);
                    break;
                case 2:
                    choose_reduce<E, 2>(a);
                    break;
                case 3:
                    choose_reduce<E, 3>(a);
                    break;
                case 4:
                    choose_reduce<E, 4>(a);
                    break;
                case 5:
                    choose_reduce<E, 5>(a);
                    break;
                case 6:
                    choose_reduce<E, 6>(a);
                    break;
                default:
                    choose_reduce<E, 7>(a);
                    break;
            }
        }
    }

    void reset() {
        for (int i = 0; i < used_; ++i) {
            Accumulator<E>& a = accumulators_[i];
            *a.count = 0;
            for (ptrdiff_t c = 0; c < args_.dim_padded; ++c) {
                a.total[c] = 0;
                a.partial[c] = 0;
                a.max[c] = -__builtin_inff();
                a.min[c] = __builtin_inff();
            }
        }
    }

    // Adds the tokens [begin, end) of sample b.
    void walk(ptrdiff_t b, ptrdiff_t begin, ptrdiff_t end) {
        if (!wanted_) return;
        const uint8_t* roles = args_.roles + b * args_.tokens;
        const E* x = static_cast<const E*>(args_.x) + b * args_.stride_batch;
        for (ptrdiff_t t = begin; t < end; ++t) {
            if (!(roles[t] & wanted_)) continue;
            for (int i = 0; i < used_; ++i)
                if (roles[t] & roles_[i]) add(accumulators_[i], x + t * args_.stride_token);
        }
        for (int i = 0; i < used_; ++i) finish(accumulators_[i]);
    }

    // Adds what another sample's accumulators hold.
    void merge(const Sample& other) {
        for (int i = 0; i < used_; ++i) {
            const Accumulator<E>&a = accumulators_[i], &o = other.accumulators_[i];
            *a.count += *o.count;
            for (ptrdiff_t c = 0; c < args_.dim; ++c) {
                a.total[c] += o.total[c];
                a.max[c] = o.max[c] > a.max[c] || o.max[c] != o.max[c] ? o.max[c] : a.max[c];
                a.min[c] = o.min[c] < a.min[c] || o.min[c] != o.min[c] ? o.min[c] : a.min[c];
            }
        }
    }

    void write(ptrdiff_t b) const {
        for (ptrdiff_t j = 0; j < args_.job_count; ++j) {
            const PoolJob& job = args_.jobs[j];
            if (job.op == PoolOp::first || job.op == PoolOp::last) continue;
            float* out = job.out + b * job.stride;
            const Accumulator<E>& a = *find(job.role);
            const double scale = 1.0 / static_cast<double>(*a.count);
            for (ptrdiff_t c = 0; c < args_.dim; ++c) {
                if (*a.count == 0)
                    out[c] = __builtin_nanf("");
                else if (job.op == PoolOp::mean)
                    out[c] = static_cast<float>(a.total[c] * scale);
                else
                    out[c] = job.op == PoolOp::max ? a.max[c] : a.min[c];
            }
        }
    }

private:
    void add(Accumulator<E>& a, const E* row) {
        a.rows[a.pending++] = row;
        if (a.pending == 2 * kGroup) reduce_first_group(a);
    }

    void reduce_first_group(Accumulator<E>& a) {
        const bool known = a.pending == 2 * kGroup;
        a.reduce_group(a.rows, known ? a.rows + kGroup : a.rows, a, args_.dim);
        a.pending -= kGroup;
        for (int i = 0; i < a.pending; ++i) a.rows[i] = a.rows[i + kGroup];
        *a.count += kGroup;
        a.in_partial += kGroup;
        if (a.in_partial == kFlush) flush(a);
    }

    void finish(Accumulator<E>& a) {
        if (a.pending >= kGroup) reduce_first_group(a);
        for (int i = 0; i < a.pending; ++i) a.reduce_one(a.rows + i, a.rows + i, a, args_.dim);
        *a.count += a.pending;
        a.pending = 0;
        flush(a);
    }

    void flush(Accumulator<E>& a) {
        for (ptrdiff_t c = 0; c < args_.dim; ++c) {
            a.total[c] += static_cast<double>(a.partial[c]);
            a.partial[c] = 0;
        }
        a.in_partial = 0;
    }

    const Accumulator<E>* find(uint8_t role) const {
        int i = 0;
        while (roles_[i] != role) ++i;
        return &accumulators_[i];
    }

    const PoolArgs& args_;
    unsigned wanted_ = 0;
    int used_ = 0;
    uint8_t roles_[8] = {};
    Accumulator<E> accumulators_[8];
};

// Copies the first or last token of its role; reads no other.
template <class E>
void gather(const PoolArgs& args, const PoolJob& job, ptrdiff_t b) {
    const uint8_t* roles = args.roles + b * args.tokens;
    const ptrdiff_t step = job.op == PoolOp::first ? 1 : -1, n = args.tokens;
    ptrdiff_t t = step > 0 ? 0 : n - 1;
    while (t >= 0 && t < n && !(roles[t] & job.role)) t += step;
    float* out = job.out + b * job.stride;
    if (t >= 0 && t < n)
        widen_row(static_cast<const E*>(args.x) + b * args.stride_batch + t * args.stride_token, out, args.dim);
    else
        for (ptrdiff_t c = 0; c < args.dim; ++c) out[c] = __builtin_nanf("");
}

template <class E>
void gather_all(const PoolArgs& args, PoolOp op, ptrdiff_t b) {
    for (ptrdiff_t j = 0; j < args.job_count; ++j)
        if (args.jobs[j].op == op) gather<E>(args, args.jobs[j], b);
}

template <class E>
void pool_all(const PoolArgs& args) {
    const ptrdiff_t span = args.tokens > 0 ? args.tokens : 1;  // a sample without tokens is written too
    const ptrdiff_t positions = args.batch * span;
#pragma omp parallel num_threads(args.threads)
    {
        const ptrdiff_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const ptrdiff_t begin = positions * me / threads, end = positions * (me + 1) / threads;
        Sample<E> continued(args, 2 * me), own(args, 2 * me + 1);
        ptrdiff_t unfinished = -1;  // the sample that begins here and ends on another thread
        for (ptrdiff_t at = begin; at < end;) {
            const ptrdiff_t b = at / span, t0 = at - b * span;
            const ptrdiff_t t1 = end - b * span < span ? end - b * span : span;
            Sample<E>& sample = t0 > 0 ? continued : own;
            sample.reset();
            if (t0 == 0) gather_all<E>(args, PoolOp::first, b);
            sample.walk(b, t0, t1 < args.tokens ? t1 : args.tokens);
            if (t1 == span) gather_all<E>(args, PoolOp::last, b);
            if (t0 == 0 && t1 == span) own.write(b);
            if (t0 == 0 && t1 < span) unfinished = b;
            at = b * span + t1;
        }
#pragma omp barrier
        if (unfinished >= 0) {
            for (ptrdiff_t other = me + 1; other < threads; ++other) {
                const ptrdiff_t from = positions * other / threads, to = positions * (other + 1) / threads;
                if (from >= (unfinished + 1) * span) break;
                if (from < to) own.merge(Sample<E>(args, 2 * other));
            }
            own.write(unfinished);
        }
    }
}

}  // namespace

void pool(const PoolArgs& args) {
    switch (args.type) {
        case RowType::float32:
            return pool_all<float>(args);
        case RowType::float16:
            return pool_all<Float16>(args);
        case RowType::bfloat16:
            return pool_all<BFloat16>(args);
        case RowType::float64:
            return;  // the binding does not let it through
    }
}

}  // namespace geofast::GEOFAST_ISA
