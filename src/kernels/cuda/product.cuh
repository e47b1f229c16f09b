// Products of small matrices, or of operands that are gathered while they are read, in f32. A block of THREADS threads
// computes a tile of the product.

// The threads form groups of SIDE by SIDE threads. A thread computes 4 by N values of the tile. Each group takes some
// of the terms of every sum, four at a time in turn, and the sums of the groups are added at the end. The order of the
// terms depends on SIDE and on the number of terms, but neither on N nor on the size of the product.
template <u32 SIDE_, u32 N_> struct Tile {
    static constexpr u32 SIDE = SIDE_, N = N_, SIZE = SIDE * SIDE, GROUPS = THREADS / SIZE;
    static constexpr u32 ROWS = 4 * SIDE, COLUMNS = N * SIDE;
    // The number of terms in shared memory at a time, and the distance of its rows. The distance is an odd multiple of
    // 16 bytes, so that threads which read successive rows use different banks.
    static constexpr u32 PART = 512 / SIDE, PITCH = PART + 4;
    // The size of the shared memory. It also holds the sums of the groups.
    static constexpr u32 FOURS = (ROWS + COLUMNS) * PITCH / 4;
    static_assert(GROUPS * ROWS * COLUMNS <= 4 * FOURS, "the sums of the groups do not fit");
};

// Four values of type V (T or float) as they are in memory. Nothing waits for them until they are converted.
template <class V> struct alignas(4 * sizeof(V)) Raw {
    u32 at[sizeof(V)];

    __device__ void set(u32 k, V value) {
        if constexpr (sizeof(V) == 4) at[k] = __float_as_uint(value);
        else at[k / 2] |= bits_of(value) << 16 * (k % 2);
    }
    __device__ float get_at(u32 k) const {
        if constexpr (sizeof(V) == 4) return __uint_as_float(at[k]);
        else return get(of_bits(at[k / 2] >> 16 * (k % 2)));
    }
};

// A factor of a product: `rows` sums, or columns of them, of `inner` terms each, with an activation `f`. In memory the
// terms follow each other if ALONG_ is true, and the rows otherwise.
template <class V_, bool ALONG_> struct Factor {
    typedef V_ V;
    typedef Raw<V> Quad;
    static constexpr bool ALONG = ALONG_;
    const V *at;
    u32 rows, inner;
    int f;
    // True if four values can be read at once.
    bool whole;

    __device__ Factor(const V *at, u32 rows, u32 inner, int f) : at(at), rows(rows), inner(inner), f(f) {
        whole = (ALONG ? inner : rows) % 4 == 0 && (u64)at % sizeof(Raw<V>) == 0;
    }

    // The data that a thread keeps about the rows that it loads.
    typedef u32 Rows;
    __device__ u32 rows_from(u32 row) const { return row; }

    // Loads four successive values, of which the first is in this row and term. Those outside are zeros.
    __device__ Raw<V> load(u32 row, u32 term) const {
        Raw<V> raw = {};
        if (row >= rows || term >= inner) return raw;
        const V *first = at + (ALONG ? (u64)row * inner + term : (u64)term * rows + row);
        if (whole) return *(const Raw<V> *)first;
        u32 count = ALONG ? inner - term : rows - row;
        _Pragma("unroll") for (u32 k = 0; k < 4; ++k) if (k < count) raw.set(k, first[k]);
        return raw;
    }

    __device__ float value(const Raw<V> &raw, u32 k) const { return activated(f, raw.get_at(k)); }
};

// The values that a thread loads of SIZE rows of a factor, for one part of the terms.
template <class Own, class A, u32 SIZE> struct Loaded {
    static constexpr u32 QUADS = SIZE * Own::PART / 4, COUNT = (QUADS + THREADS - 1) / THREADS;
    static_assert(A::ALONG || SIZE % 16 == 0, "rows are loaded by 16");
    typename A::Quad at[COUNT];
    typename A::Rows rows[COUNT];

    // The first row and term of the quad. Where rows follow each other, four threads load 16 of them.
    static __device__ u32 row_of(u32 quad) {
        return A::ALONG ? quad / (Own::PART / 4) : 16 * (quad / (4 * Own::PART)) + 4 * (quad % 4);
    }
    static __device__ u32 term_of(u32 quad) {
        return A::ALONG ? 4 * (quad % (Own::PART / 4)) : quad / 4 % Own::PART;
    }

    __device__ Loaded(const A &a, u32 row) {
        _Pragma("unroll") for (u32 n = 0; n < COUNT; ++n) {
            rows[n] = a.rows_from(row + row_of(threadIdx.x + n * THREADS));
        }
    }

    __device__ void load(const A &a, u32 term) {
        _Pragma("unroll") for (u32 n = 0; n < COUNT; ++n) {
            u32 quad = threadIdx.x + n * THREADS;
            if (quad < QUADS) at[n] = a.load(rows[n], term + term_of(quad));
        }
    }

    // Writes the values to shared memory: by the row, then by the term.
    __device__ void keep(const A &a, float *shared) const {
        _Pragma("unroll") for (u32 n = 0; n < COUNT; ++n) {
            u32 quad = threadIdx.x + n * THREADS;
            if (quad >= QUADS) continue;
            float *to = shared + row_of(quad) * Own::PITCH + term_of(quad);
            Four four;
            for (u32 k = 0; k < 4; ++k) four.at[k] = a.value(at[n], k);
            if (A::ALONG) *(Four *)to = four;
            else for (u32 k = 0; k < 4; ++k) to[k * Own::PITCH] = four.at[k];
        }
    }
};

// Computes the tile of the product of `a` and `b` that begins at row `row` and column `column`, a row of `b`. Calls
// `each(left)` for each part of the terms, with those of `a` in shared memory, and then `take(row, column, sum)` for
// each value, in one of the threads. The next part is loaded while the present one is multiplied.
template <class Own, class A, class B, class E, class F>
__device__ inline void product(const A &a, const B &b, u32 row, u32 column, Four *shared, E each, F take) {
    constexpr u32 SIDE = Own::SIDE, N = Own::N, SIZE = Own::SIZE, PART = Own::PART, PITCH = Own::PITCH;
    float *left = (float *)shared, *right = left + Own::ROWS * PITCH;
    u32 group = threadIdx.x / SIZE, own = threadIdx.x % SIZE, y = own / SIDE, x = own % SIDE, inner = a.inner;
    // Two groups of the same warp read terms whose distance is 16, so that they use different banks.
    u32 first = SIZE == 16 ? (group & 8) | (group & 1) << 2 | (group >> 1 & 3) : group;
    float sum[4][N] = {};
    Loaded<Own, A, Own::ROWS> of_a(a, row);
    Loaded<Own, B, Own::COLUMNS> of_b(b, column);
    of_a.load(a, 0);
    of_b.load(b, 0);
    for (u32 begin = 0; begin < inner; begin += PART) {
        __syncthreads();
        of_a.keep(a, left);
        of_b.keep(b, right);
        __syncthreads();
        if (begin + PART < inner) {
            of_a.load(a, begin + PART);
            of_b.load(b, begin + PART);
        }
        for (u32 term = 4 * first; term < PART && begin + term < inner; term += 4 * Own::GROUPS) {
            Four of_row[4];
            _Pragma("unroll") for (u32 i = 0; i < 4; ++i) {
                of_row[i] = *(const Four *)(left + (y + SIDE * i) * PITCH + term);
            }
            _Pragma("unroll") for (u32 j = 0; j < N; ++j) {
                Four of_column = *(const Four *)(right + (x + SIDE * j) * PITCH + term);
                _Pragma("unroll") for (u32 i = 0; i < 4; ++i)
                    for (u32 k = 0; k < 4; ++k) sum[i][j] += of_row[i].at[k] * of_column.at[k];
            }
        }
        each(left);
    }
    constexpr u32 VALUES = Own::ROWS * Own::COLUMNS;
    float *sums = (float *)shared;
    __syncthreads();
    _Pragma("unroll") for (u32 i = 0; i < 4; ++i)
        for (u32 j = 0; j < N; ++j) sums[group * VALUES + (i * N + j) * SIZE + own] = sum[i][j];
    __syncthreads();
    for (u32 value = threadIdx.x; value < VALUES; value += THREADS) {
        float total = 0.0f;
        for (u32 k = 0; k < Own::GROUPS; ++k) total += sums[k * VALUES + value];
        u32 part = value / SIZE, thread = value % SIZE;
        u32 i = row + thread / SIDE + SIDE * (part / N), j = column + thread % SIDE + SIDE * (part % N);
        if (i < a.rows && j < b.rows) take(i, j, total);
    }
}
