// Attention by products of tiles on tensor cores, in which no matrix of scores is in memory: FlashAttention-2
// (Dao 2023, algorithms 1 and 2). For f16 and bf16, on devices of compute capability 8.0 and later. HEAD, 32, 64, 128
// or 256, is defined before this source: heads of at most HEAD channels, a multiple of 8, are filled up with zeros.
//
// A block computes ROWS rows of its result (queries, or keys with their values), 16 in each of its warps, and keeps
// them in registers. It reads the rows of the other side STEP at a time. Every sum has a fixed order.

#define ROWS 64
#define BLOCK 128

// Blocks that a multiprocessor holds at once, which limits the registers of a thread.
#define BLOCKS (HEAD <= 32 ? 4 : HEAD <= 64 ? 3 : 2)

// Values from one row of a tile to the next. With eight values more than a row has, the eight addresses of 16 bytes
// that are read together are in different banks.
#define STRIDE (HEAD + 8)

#ifndef DDPM_TENSOR_CORES

extern __shared__ Packed dynamic_shared[];

__device__ inline u32 shared_address(const void *x) {
    u32 address;
    asm("{ .reg .u64 own; cvta.to.shared.u64 own, %1; cvt.u32.u64 %0, own; }" : "=r"(address) : "l"(x));
    return address;
}

// Begins to copy 16 bytes to shared memory, or to write 16 zeros if `there` is false.
__device__ inline void copy_16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Waits for the copies that this thread began.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads four matrices of 8 rows of 8 values for the threads of a warp. Thread 8 i + r has the address of row r of
// matrix i. Thread t receives two values of each: of row t / 4, columns 2 (t % 4) and the next.
__device__ inline void load_matrices(u32 (&to)[4], const T *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// The same for the transposed matrices.
__device__ inline void load_transposed(u32 (&to)[4], const T *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

#if defined(DDPM_BF16)
#define FACTORS "bf16"
#else
#define FACTORS "f16"
#endif

// Rounds two values to the type of maps, the first in the lower half.
__device__ inline u32 pair(float first, float second) {
    u32 bits;
    asm("cvt.rn." FACTORS "x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}

// Adds the product of a (16, 16) and b (16, 8) to `sum` (16, 8), in the threads of a warp. The registers hold what
// the PTX ISA states for mma.m16n8k16.
__device__ inline void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." FACTORS "." FACTORS ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

#define UNROLL _Pragma("unroll")

__device__ inline u32 lane() { return threadIdx.x % 32; }

// The values of a warp's tile of 16 rows by N columns that belong to thread t: of each 8 columns,
// columns 2 (t % 4) and the next, in row t / 4 and then in row t / 4 + 8.
template <u32 N> struct Fragment {
    float at[N / 8][4];
};

template <u32 N> __device__ inline void set_zero(Fragment<N> &x) {
    UNROLL for (u32 i = 0; i < N / 8; ++i)
        UNROLL for (u32 j = 0; j < 4; ++j) x.at[i][j] = 0.0f;
}

// The column of a thread's value, and its row within the block.
__device__ inline u32 column_of(u32 i, u32 j) { return 8 * i + 2 * (lane() % 4) + j % 2; }
__device__ inline u32 row_of(u32 half) { return threadIdx.x / 32 * 16 + lane() / 4 + 8 * half; }

// A matrix in memory: q, k, v, y or a gradient of them, of one image and head.
template <class P> struct Rows {
    P first;
    u32 stride;
};

struct Sizes {
    // Positions and channels of an image, and the channels of a head.
    u32 positions, channels, head;
    float scale;

    __device__ u32 heads() const { return channels / head; }
    __device__ u32 tiles() const { return (positions + ROWS - 1) / ROWS; }
    // The image and head of the block, by one number.
    __device__ u32 unit() const { return blockIdx.x / tiles(); }
    // The first row of the block.
    __device__ u32 first() const { return blockIdx.x % tiles() * ROWS; }

    // The rows of the block's head within a map of `parts` times as many channels.
    template <class P> __device__ Rows<P> rows(P map, u32 parts, u32 part) const {
        u64 image = unit() / heads(), own = unit() % heads();
        u32 stride = parts * channels;
        return {map + image * positions * stride + part * channels + own * head, stride};
    }
};

// Begins to copy N rows to shared memory. Rows and columns that do not exist are zero.
template <u32 N> __device__ inline void load_rows(T *tile, Rows<const T *> x, u32 first, const Sizes &sizes) {
    u32 column = threadIdx.x % (HEAD / 8) * 8, begin = threadIdx.x / (HEAD / 8);
    // Unrolled further, the addresses would take registers.
    _Pragma("unroll 2") for (u32 row = begin; row < N; row += BLOCK / (HEAD / 8)) {
        bool there = first + row < sizes.positions && column < sizes.head;
        u64 offset = there ? (u64)(first + row) * x.stride + column : 0;
        copy_16(tile + row * STRIDE + column, x.first + offset, there);
    }
}

// Writes the block's rows, through shared memory of ROWS rows in order to write whole lines.
__device__ inline void store_rows(const Fragment<HEAD> &x, T *tile, Rows<T *> y, const Sizes &sizes) {
    UNROLL for (u32 i = 0; i < HEAD / 8; ++i)
        UNROLL for (u32 half = 0; half < 2; ++half) {
            *(u32 *)(tile + row_of(half) * STRIDE + column_of(i, 0)) = pair(x.at[i][2 * half], x.at[i][2 * half + 1]);
        }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * HEAD / 8; i += BLOCK) {
        u32 row = sizes.first() + i / (HEAD / 8), column = i % (HEAD / 8) * 8;
        if (row >= sizes.positions || column >= sizes.head) continue;
        *(Packed *)(y.first + (u64)row * y.stride + column) =
            *(const Packed *)(tile + i / (HEAD / 8) * STRIDE + column);
    }
}

// Computes the products of 16 rows of `a` for each warp with N rows of `b`.
template <u32 N> __device__ inline void products_of_rows(Fragment<N> &products, const T *a, const T *b) {
    set_zero(products);
    a += (threadIdx.x / 32 * 16 + lane() % 16) * STRIDE + lane() / 16 * 8;
    b += (lane() % 8 + lane() / 16 * 8) * STRIDE + lane() / 8 % 2 * 8;
    _Pragma("unroll 2") for (u32 k = 0; k < HEAD; k += 16) {
        u32 left[4], right[4];
        load_matrices(left, a + k);
        UNROLL for (u32 n = 0; n < N; n += 16) {
            load_matrices(right, b + n * STRIDE + k);
            multiply_add(products.at[n / 8], left, right[0], right[1]);
            multiply_add(products.at[n / 8 + 1], left, right[2], right[3]);
        }
    }
}

// Adds to `sum` the N rows of `x`, weighted for each row of `sum` by a row of `weights`.
template <u32 N>
__device__ inline void add_weighted(Fragment<HEAD> &sum, const Fragment<N> &weights, const T *x) {
    x += lane() % 16 * STRIDE + lane() / 16 * 8;
    UNROLL for (u32 k = 0; k < N; k += 16) {
        const auto &of = weights.at;
        u32 left[4], right[4];
        UNROLL for (u32 i = 0; i < 4; ++i) {
            left[i] = pair(of[k / 8 + i / 2][i % 2 * 2], of[k / 8 + i / 2][i % 2 * 2 + 1]);
        }
        UNROLL for (u32 n = 0; n < HEAD; n += 16) {
            load_transposed(right, x + k * STRIDE + n);
            multiply_add(sum.at[n / 8], left, right[0], right[1]);
            multiply_add(sum.at[n / 8 + 1], left, right[2], right[3]);
        }
    }
}

// The sum and the maximum over the four threads that share rows.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Exponentials have base 2.
#define LOG2_E 1.44269504088896340736f

// The values of a query: its largest product with a key, the base 2 logarithm of the sum of the exponentials of its
// scores minus the largest score, and the product of the rows of dy and y.
struct alignas(16) Query {
    float most, log, sum, unused;
};

// Computes y = softmax(scale q k^T) v, and the first two values of `queries` (batch, heads, positions). `qkv` (batch,
// positions, 3 channels) holds q, k and v side by side, and `y` is (batch, positions, channels). One block per ROWS
// queries, of each head, of each image.
extern "C" __launch_bounds__(BLOCK, BLOCKS) __global__ void attend(
    const T *qkv, T *y, Query *queries, u32 positions, u32 channels, u32 head, float scale
) {
    const u32 STEP = 64;
    const Sizes sizes = {positions, channels, head, scale};
    T *q = (T *)dynamic_shared, *k = q + ROWS * STRIDE, *v = k + STEP * STRIDE;
    const auto keys = sizes.rows(qkv, 3, 1), values = sizes.rows(qkv, 3, 2);
    load_rows<ROWS>(q, sizes.rows(qkv, 3, 0), sizes.first(), sizes);
    load_rows<STEP>(k, keys, 0, sizes);
    const float by = scale * LOG2_E;
    float most[2] = {-infinite(), -infinite()}, total[2] = {0.0f, 0.0f};
    Fragment<HEAD> sum;
    set_zero(sum);
    for (u32 begin = 0; begin < positions; begin += STEP) {
        wait_for_copies();
        __syncthreads();
        load_rows<STEP>(v, values, begin, sizes);
        Fragment<STEP> p;
        products_of_rows(p, q, k);
        if (begin + STEP > positions) {
            UNROLL for (u32 i = 0; i < STEP / 8; ++i)
                UNROLL for (u32 j = 0; j < 4; ++j) {
                    if (begin + column_of(i, j) >= positions) p.at[i][j] = -infinite();
                }
        }
        UNROLL for (u32 half = 0; half < 2; ++half) {
            float own = most[half];
            UNROLL for (u32 i = 0; i < STEP / 8; ++i)
                UNROLL for (u32 j = 2 * half; j < 2 * half + 2; ++j) own = fmaxf(own, p.at[i][j]);
            own = row_max(own);
            // The exponents of earlier sums were smaller by this much.
            float factor = exp2f((most[half] - own) * by);
            most[half] = own;
            total[half] *= factor;
            UNROLL for (u32 i = 0; i < STEP / 8; ++i)
                UNROLL for (u32 j = 2 * half; j < 2 * half + 2; ++j) {
                    p.at[i][j] = exp2f((p.at[i][j] - own) * by);
                    total[half] += p.at[i][j];
                }
            UNROLL for (u32 i = 0; i < HEAD / 8; ++i)
                UNROLL for (u32 j = 2 * half; j < 2 * half + 2; ++j) sum.at[i][j] *= factor;
        }
        wait_for_copies();
        __syncthreads();
        if (begin + STEP < positions) load_rows<STEP>(k, keys, begin + STEP, sizes);
        add_weighted(sum, p, v);
    }
    UNROLL for (u32 half = 0; half < 2; ++half) {
        total[half] = row_sum(total[half]);
        u32 row = sizes.first() + row_of(half);
        if (lane() % 4 == 0 && row < positions) {
            queries[(u64)sizes.unit() * positions + row] = {most[half], log2f(total[half]), 0.0f, 0.0f};
        }
        const float factor = 1.0f / total[half];
        UNROLL for (u32 i = 0; i < HEAD / 8; ++i)
            UNROLL for (u32 j = 2 * half; j < 2 * half + 2; ++j) sum.at[i][j] *= factor;
    }
    store_rows(sum, q, sizes.rows(y, 1, 0), sizes);
}

// Computes, for each of a thread's two rows, the product of the rows of dy (in shared memory) and y.
__device__ inline void multiply_rows(float (&sum)[2], const T *dy, Rows<const T *> y, const Sizes &sizes) {
    const T *rows[2];
    UNROLL for (u32 half = 0; half < 2; ++half) {
        u32 row = sizes.first() + row_of(half);
        rows[half] = y.first + (u64)(row < sizes.positions ? row : 0) * y.stride;
        sum[half] = 0.0f;
    }
    _Pragma("unroll 8") for (u32 i = 0; i < sizes.head / 8; ++i) {
        u32 column = column_of(i, 0);
        UNROLL for (u32 half = 0; half < 2; ++half) {
            Pack<2> a = *(const Pack<2> *)(dy + row_of(half) * STRIDE + column);
            Pack<2> b = *(const Pack<2> *)(rows[half] + column);
            sum[half] += get(a.at[0]) * get(b.at[0]) + get(a.at[1]) * get(b.at[1]);
        }
    }
    UNROLL for (u32 half = 0; half < 2; ++half) sum[half] = row_sum(sum[half]);
}

// Returns the values of the query of a tile's row. They follow the row in shared memory.
__device__ inline Query *numbers_of(T *tile, u32 row) { return (Query *)(tile + row * STRIDE + HEAD); }

// Computes the block's rows of gradients. With p = softmax(scale q k^T) and ds = p (dy v^T - sums of queries):
//
// - OF_KEYS false: dq = scale ds k. The kernel also writes the sums of its queries.
// - OF_KEYS and FIRST: dk = scale ds^T q.
// - OF_KEYS and SECOND: dv = p^T dy.
template <bool OF_KEYS, bool FIRST, bool SECOND>
__device__ inline void gradients(
    const T *qkv, const T *y, const T *dy, Query *queries, T *dqkv, const Sizes &sizes
) {
    const u32 STEP = 32;
    T *own_a = (T *)dynamic_shared, *own_b = own_a + ROWS * STRIDE, *a = own_b + ROWS * STRIDE, *b = a + STEP * STRIDE;
    const auto q = sizes.rows(qkv, 3, 0), k = sizes.rows(qkv, 3, 1), v = sizes.rows(qkv, 3, 2);
    const auto d = sizes.rows(dy, 1, 0);
    const u32 first = sizes.first(), positions = sizes.positions;
    // Scores are products of rows of `own_a` and `a`, and the gradients of p those of `own_b` and `b`.
    load_rows<ROWS>(own_a, OF_KEYS ? k : q, first, sizes);
    if (FIRST) load_rows<ROWS>(own_b, OF_KEYS ? v : d, first, sizes);
    queries += (u64)sizes.unit() * positions;
    const auto load_a = [=](u32 begin) {
        if (begin >= positions) return;
        load_rows<STEP>(a, OF_KEYS ? q : k, begin, sizes);
        if (!OF_KEYS || threadIdx.x >= STEP) return;
        bool there = begin + threadIdx.x < positions;
        copy_16(numbers_of(a, threadIdx.x), queries + (there ? begin + threadIdx.x : 0), there);
    };
    load_a(0);
    load_rows<STEP>(b, OF_KEYS ? d : v, 0, sizes);
    Query own[2] = {};
    if (!OF_KEYS) {
        wait_for_copies();
        __syncthreads();
        float sum[2];
        multiply_rows(sum, own_b, sizes.rows(y, 1, 0), sizes);
        UNROLL for (u32 half = 0; half < 2; ++half) {
            u32 row = first + row_of(half);
            if (row < positions) {
                own[half].most = queries[row].most;
                own[half].log = queries[row].log;
                if (lane() % 4 == 0) queries[row].sum = sum[half];
            }
            own[half].sum = sum[half];
        }
    }
    const float by = sizes.scale * LOG2_E;
    Fragment<HEAD> of_a, of_b;
    if (FIRST) set_zero(of_a);
    if (SECOND) set_zero(of_b);
    for (u32 begin = 0; begin < positions; begin += STEP) {
        wait_for_copies();
        __syncthreads();
        Fragment<STEP> p, ds;
        products_of_rows(p, own_a, a);
        if (FIRST) products_of_rows(ds, own_b, b);
        UNROLL for (u32 i = 0; i < STEP / 8; ++i)
            UNROLL for (u32 j = 0; j < 4; ++j) {
                u32 column = column_of(i, j);
                const Query of = OF_KEYS ? *numbers_of(a, column) : own[j / 2];
                bool there = begin + column < positions;
                p.at[i][j] = there ? exp2f((p.at[i][j] - of.most) * by - of.log) : 0.0f;
                if (FIRST) ds.at[i][j] = p.at[i][j] * (ds.at[i][j] - of.sum);
            }
        if (!FIRST) {
            // There are no further products with `a`.
            __syncthreads();
            load_a(begin + STEP);
        }
        if (SECOND) add_weighted(of_b, p, b);
        __syncthreads();
        if (begin + STEP < positions) load_rows<STEP>(b, OF_KEYS ? d : v, begin + STEP, sizes);
        if (FIRST) {
            add_weighted(of_a, ds, a);
            __syncthreads();
            load_a(begin + STEP);
        }
    }
    if (FIRST) {
        UNROLL for (u32 i = 0; i < HEAD / 8; ++i)
            UNROLL for (u32 j = 0; j < 4; ++j) of_a.at[i][j] *= sizes.scale;
        store_rows(of_a, own_a, sizes.rows(dqkv, 3, OF_KEYS), sizes);
    }
    if (SECOND) store_rows(of_b, own_b, sizes.rows(dqkv, 3, 2), sizes);
}

// Computes the gradient of the queries, and their sums. One block per ROWS queries.
extern "C" __launch_bounds__(BLOCK, BLOCKS) __global__ void gradient_of_queries(
    const T *qkv, const T *y, const T *dy, Query *queries, T *dqkv, u32 positions, u32 channels, u32 head, float scale
) {
    gradients<false, true, false>(qkv, y, dy, queries, dqkv, {positions, channels, head, scale});
}

// Computes the gradients of keys and values. One block per ROWS of them. If the registers of a block cannot hold both,
// there are twice as many blocks (in y).
extern "C" __launch_bounds__(BLOCK, BLOCKS) __global__ void gradient_of_keys(
    const T *qkv, const T *dy, Query *queries, T *dqkv, u32 positions, u32 channels, u32 head, float scale
) {
    const Sizes sizes = {positions, channels, head, scale};
    if (HEAD <= 128) gradients<true, true, true>(qkv, dy, dy, queries, dqkv, sizes);
    else if (blockIdx.y) gradients<true, false, true>(qkv, dy, dy, queries, dqkv, sizes);
    else gradients<true, true, false>(qkv, dy, dy, queries, dqkv, sizes);
}
