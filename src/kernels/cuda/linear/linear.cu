// Linear layers with the activations of their inputs, sinusoids of timesteps, and tables of vectors.

// Computes [sin | cos] of each timestep times `half` geometrically falling frequencies, of which the first is `scale`.
// With `between`, t holds f32. With `flip`, the cosines come first.
extern "C" __global__ void sinusoids(
    const u32 *t, T *y, u32 half, double decay, double scale, int between, int flip, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    u32 k = i % (2 * half);
    u32 image = i / (2 * half);
    double time = between ? (double)((const float *)t)[image] : (double)t[image];
    double angle = time * (scale * exp(-decay * (k % half)));
    y[i] = put((float)((k < half) != (flip != 0) ? sin(angle) : cos(angle)));
}

extern "C" __global__ void add_class(
    const T *x, const float *table, const u32 *index, T *y, u32 rows, u32 columns, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    u32 row = index[i / columns];
    float more = row < rows ? table[(u64)row * columns + i % columns] : not_a_number();
    y[i] = put(get(x[i]) + more);
}

// One thread per value of the sums, which adds the vectors of its row in the order of the batch.
extern "C" __global__ void sums_by_class(
    const T *x, const u32 *index, float *sums, u32 batch, u32 columns, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    double sum = 0.0;
    for (u32 k = 0; k < batch; ++k) {
        if (index[k] == i / columns) sum += get(x[(u64)k * columns + i % columns]);
    }
    sums[i] = (float)sum;
}

// Products of small matrices in f32: a block of THREADS threads computes a tile of 32 by 32 values. The products of
// linear layers take little time, and one launch is faster than several with tensor cores.
#define TILE 32

// A tile of a factor: by the index of the sum, then by the row or column of the product.
typedef float Factor[TILE][TILE + 1];

// Loads `value(i, k)` for the rows or columns `i` from `first` on, and the indices `k` of the sum from `begin` on, as
// far as there are `rows` and `inner` of them. In memory, `k` is the faster index if ALONG is true.
template <bool ALONG, class F>
__device__ inline void load_factor(Factor &tile, F value, u32 first, u32 rows, u32 begin, u32 inner) {
    for (u32 i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        u32 k = ALONG ? i % TILE : i / TILE, row = ALONG ? i / TILE : i % TILE;
        tile[k][row] = first + row < rows && begin + k < inner ? value(first + row, begin + k) : 0.0f;
    }
}

// The values of a tile that belong to a thread: rows threadIdx.x / 16 and 16 below, columns threadIdx.x % 16 and 16
// to the right.
struct Quarter {
    float at[2][2];
};

// Computes the tile of the product of `a` (rows, inner) and `b` (inner, columns) that begins at row `row` and column
// `column`. Calls `each()` after each part of the sum was loaded.
template <bool A_ALONG, bool B_ALONG, class A, class B, class E>
__device__ inline Quarter product(
    A a, B b, u32 row, u32 rows, u32 column, u32 columns, u32 inner, Factor &left, Factor &right, E each
) {
    Quarter sum = {{{0.0f, 0.0f}, {0.0f, 0.0f}}};
    u32 y = threadIdx.x / 16, x = threadIdx.x % 16;
    for (u32 begin = 0; begin < inner; begin += TILE) {
        __syncthreads();
        load_factor<A_ALONG>(left, a, row, rows, begin, inner);
        load_factor<B_ALONG>(right, b, column, columns, begin, inner);
        __syncthreads();
        for (u32 k = 0; k < TILE; ++k) {
            float l[2] = {left[k][y], left[k][y + 16]}, r[2] = {right[k][x], right[k][x + 16]};
            for (u32 i = 0; i < 2; ++i)
                for (u32 j = 0; j < 2; ++j) sum.at[i][j] += l[i] * r[j];
        }
        each();
    }
    return sum;
}

// Calls `take(row, column, value)` for the values of a thread within the product.
template <class F>
__device__ inline void each_of(const Quarter &own, u32 row, u32 rows, u32 column, u32 columns, F take) {
    for (u32 i = 0; i < 2; ++i)
        for (u32 j = 0; j < 2; ++j) {
            u32 y = row + threadIdx.x / 16 + 16 * i, x = column + threadIdx.x % 16 + 16 * j;
            if (y < rows && x < columns) take(y, x, own.at[i][j]);
        }
}

// Applies the activation `f` to vectors `x` (batch, input), then a layer of weights (output, input) and a bias. Blocks
// are tiles of the output: 32 vectors (in y) by 32 values (in x).
extern "C" __global__ void linear(
    const T *x, const float *weight, const float *bias, T *y, int f, u32 batch, u32 input, u32 output
) {
    __shared__ Factor left, right;
    u32 row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    auto activations = [=](u32 i, u32 k) { return activated(f, get(x[(u64)i * input + k])); };
    auto weights = [=](u32 i, u32 k) { return weight[(u64)i * input + k]; };
    Quarter own = product<true, true>(
        activations, weights, row, batch, column, output, input, left, right, [] {}
    );
    each_of(own, row, batch, column, output, [=](u32 i, u32 j, float sum) {
        y[(u64)i * output + j] = put(sum + bias[j]);
    });
}

// The gradient `dy` (batch, output) of a layer's output and the layer's weights (output, input), by their addresses.
struct Term {
    u64 dy, weight;
    u32 output, unused;
};

struct Terms {
    Term at[64];
};

// Computes the gradient of the vectors `x` (batch, input), which layers read after the same activation `f`. Blocks are
// tiles of it: 32 vectors (in y) by 32 values (in x), for each layer (in z). With one layer the result is `dx`, and
// otherwise `parts` (layers, batch, input), which `sum_parts` sums.
extern "C" __global__ void linear_input_gradient(
    Terms terms, const T *x, T *dx, float *parts, int f, u32 batch, u32 input
) {
    __shared__ Factor left, right;
    u32 row = blockIdx.y * TILE, column = blockIdx.x * TILE, output = terms.at[blockIdx.z].output;
    const T *dy = (const T *)terms.at[blockIdx.z].dy;
    const float *weight = (const float *)terms.at[blockIdx.z].weight;
    auto gradients = [=](u32 i, u32 k) { return get(dy[(u64)i * output + k]); };
    auto weights = [=](u32 i, u32 k) { return weight[(u64)k * input + i]; };
    Quarter own = product<true, false>(
        gradients, weights, row, batch, column, input, output, left, right, [] {}
    );
    parts += parts ? (u64)blockIdx.z * batch * input : 0;
    each_of(own, row, batch, column, input, [=](u32 i, u32 j, float sum) {
        u64 at = (u64)i * input + j;
        if (parts) parts[at] = sum;
        else dx[at] = put(sum * derivative(f, get(x[at])));
    });
}

// Sums the gradients of several layers in their order.
extern "C" __global__ void sum_parts(const float *parts, const T *x, T *dx, int f, u32 layers, u32 count) {
    u32 i = global_index();
    if (i >= count) return;
    float sum = 0.0f;
    for (u32 k = 0; k < layers; ++k) sum += parts[(u64)k * count + i];
    dx[i] = put(sum * derivative(f, get(x[i])));
}

// A layer whose input `x` (batch, input) and gradient `dy` (batch, output) of the output are given, and its gradients
// of weight and bias, by their addresses. Its blocks begin with number `first`.
struct Layer {
    u64 x, dy, weight, bias;
    u32 input, output, first;
    int f;
};

struct Layers {
    Layer at[64];
};

// Computes the gradients of the weights and biases of `count` layers. Blocks are tiles of a weight of 32 outputs by 32
// inputs; those of 32 outputs follow each other.
extern "C" __global__ void linear_weight_gradients(Layers layers, u32 batch, u32 count) {
    __shared__ Factor left, right;
    u32 which = 0;
    while (which + 1 < count && blockIdx.x >= layers.at[which + 1].first) ++which;
    const T *x = (const T *)layers.at[which].x, *dy = (const T *)layers.at[which].dy;
    float *weight = (float *)layers.at[which].weight, *bias = (float *)layers.at[which].bias;
    u32 input = layers.at[which].input, output = layers.at[which].output, block = blockIdx.x - layers.at[which].first;
    int f = layers.at[which].f;
    u32 wide = (input + TILE - 1) / TILE, row = block / wide * TILE, column = block % wide * TILE;
    auto gradients = [=](u32 i, u32 k) { return get(dy[(u64)k * output + i]); };
    auto activations = [=](u32 i, u32 k) { return activated(f, get(x[(u64)k * input + i])); };
    float sum = 0.0f;
    Quarter own = product<false, false>(
        gradients, activations, row, output, column, input, batch, left, right, [&] {
            if (column == 0 && threadIdx.x < TILE) {
                for (u32 k = 0; k < TILE; ++k) sum += left[k][threadIdx.x];
            }
        }
    );
    each_of(own, row, output, column, input, [=](u32 i, u32 j, float value) {
        weight[(u64)i * input + j] = value;
    });
    if (column == 0 && threadIdx.x < TILE && row + threadIdx.x < output) bias[row + threadIdx.x] = sum;
}
