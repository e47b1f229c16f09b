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

// Products of small matrices in f32. The products of linear layers take little time: one launch takes less than several
// launches with tensor cores.

// In the forward pass, blocks compute small tiles. Latency limits the time, so more blocks share the work.
typedef Tile<4, 4> Forward;
// For few vectors, blocks compute a quarter of such a tile.
typedef Tile<4, 1> Narrow;
// The gradients of many layers are computed together, so there are enough blocks.
typedef Tile<8, 4> Backward;

// Applies the activation `f` to vectors `x` (batch, input), then a layer of weights (output, input) and a bias. Blocks
// are tiles of the output: 16 vectors (in y) by 16 values, or by 4 with `narrow` (in x). The output has the
// same bits with both.
extern "C" __global__ void linear(
    const T *x, const float *weight, const float *bias, T *y, int f, int narrow, u32 batch, u32 input, u32 output
) {
    __shared__ Four shared[Forward::FOURS];
    Factor<T, true> vectors(x, batch, input, f);
    Factor<float, true> weights(weight, output, input, 0);
    auto take = [=](u32 i, u32 j, float sum) { y[(u64)i * output + j] = put(sum + bias[j]); };
    auto each = [](const float *) {};
    u32 row = blockIdx.y * Forward::ROWS;
    if (narrow) product<Narrow>(vectors, weights, row, blockIdx.x * Narrow::COLUMNS, shared, each, take);
    else product<Forward>(vectors, weights, row, blockIdx.x * Forward::COLUMNS, shared, each, take);
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
    __shared__ Four shared[Backward::FOURS];
    const Term &own = terms.at[blockIdx.z];
    Factor<T, true> gradients((const T *)own.dy, batch, own.output, 0);
    Factor<float, false> weights((const float *)own.weight, input, own.output, 0);
    parts += parts ? (u64)blockIdx.z * batch * input : 0;
    u32 row = blockIdx.y * Backward::ROWS, column = blockIdx.x * Backward::COLUMNS;
    product<Backward>(gradients, weights, row, column, shared, [](const float *) {}, [=](u32 i, u32 j, float sum) {
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
    __shared__ Four shared[Backward::FOURS];
    u32 which = 0;
    while (which + 1 < count && blockIdx.x >= layers.at[which + 1].first) ++which;
    const Layer &own = layers.at[which];
    u32 input = own.input, output = own.output, block = blockIdx.x - own.first;
    float *weight = (float *)own.weight, *bias = (float *)own.bias;
    Factor<T, false> gradients((const T *)own.dy, output, batch, 0), activations((const T *)own.x, input, batch, own.f);
    u32 wide = (input + Backward::COLUMNS - 1) / Backward::COLUMNS;
    u32 row = block / wide * Backward::ROWS, column = block % wide * Backward::COLUMNS;
    bool sums_rows = column == 0 && threadIdx.x < Backward::ROWS && row + threadIdx.x < output;
    float sum = 0.0f;
    auto each = [&](const float *left) {
        if (!sums_rows) return;
        for (u32 term = 0; term < Backward::PART; term += 4) {
            Four four = *(const Four *)(left + threadIdx.x * Backward::PITCH + term);
            for (u32 k = 0; k < 4; ++k) sum += four.at[k];
        }
    };
    product<Backward>(gradients, activations, row, column, shared, each, [=](u32 i, u32 j, float value) {
        weight[(u64)i * input + j] = value;
    });
    if (sums_rows) bias[row + threadIdx.x] = sum;
}
