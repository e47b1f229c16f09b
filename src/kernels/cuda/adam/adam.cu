// AdamW, gradient clipping, loss scaling and the average of the weights. Three launches update all weights except for
// the matrices of Muon, which need more launches. The host waits for no launch.

// The tensors of a weight, in f32. The addresses of the gradient and the average may be null. A matrix that Muon
// updates has no mean of squares. It has memory for the matrix to be orthogonalised, and the scale of its update.
struct Weight {
    float *weight, *mean, *square, *average;
    const float *gradient;
    u64 count;
    float *direction;
    double scale;
};

// The part of a weight that one block updates: at most CHUNK values.
struct Part {
    u32 weight;
    u32 chunk;
};

#define CHUNK 4096

struct UpdateSettings {
    double beta1, beta2, eps, l2, decoupled;
    double max_norm;
    double ema_decay, ema_warmup;
    // 0 if gradients are not scaled.
    double scaled, growth_factor, growth_interval, backoff_factor, min_scale;
    // The settings of Muon.
    double momentum, nesterov, muon_decoupled;
};

// The state that updates change, and the factors of the present update.
struct Control {
    double steps, ema_updates;
    double good_updates, skipped, exhausted;
    float skip;
    float mean[2], square[2], average[2];
    float eps, step_size, root_scale, keep, l2, gradient_scale;
    // Of Muon's matrices.
    float momentum[2], nesterov, muon_keep, learning_rate;
};

// Computes the sum of squares of each block's part of the gradient.
extern "C" __global__ void gradient_squares(const Weight *weights, const Part *parts, double *squares) {
    __shared__ double sums[THREADS];
    Weight own = weights[parts[blockIdx.x].weight];
    u64 first = (u64)parts[blockIdx.x].chunk * CHUNK;
    double sum = 0.0;
    for (u64 i = first + threadIdx.x; own.gradient && i < own.count && i < first + CHUNK; i += THREADS) {
        sum += (double)own.gradient[i] * own.gradient[i];
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// Computes the factors of this update from the sums of squares, in one block. `scale` holds the factor by
// which gradients were multiplied, and is set to the next one. `norm` is set to the norm of the gradient
// before clipping.
extern "C" __global__ void begin_update(
    const double *squares, u32 count, UpdateSettings s, const double *learning_rate, Control *control, float *scale,
    float *norm
) {
    __shared__ double sums[THREADS];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) sum += squares[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x != 0) return;

    double unscale = s.scaled != 0.0 ? 1.0 / *scale : 1.0;
    double total = sqrt(sum) * unscale;
    // For larger norms, the square of a gradient may overflow f32, and Adam's mean of squares would stay
    // infinite.
    if (!(total < 1e18)) total *= infinite();
    *norm = (float)total;
    bool finite = is_finite(total);

    Control c = *control;
    c.skip = 0.0f;
    if (s.scaled != 0.0) {
        if (!finite) {
            c.skip = 1.0f;
            c.exhausted = *scale <= s.min_scale ? 1.0 : 0.0;
            *scale = (float)fmax(*scale * s.backoff_factor, s.min_scale);
            c.good_updates = 0.0;
            c.skipped += 1.0;
            *control = c;
            return;
        }
        c.good_updates += 1.0;
        if (c.good_updates >= s.growth_interval) {
            float grown = (float)(*scale * s.growth_factor);
            if (is_finite(grown)) *scale = grown;
            c.good_updates = 0.0;
        }
    }
    double clip = is_finite(s.max_norm) ? fmin(s.max_norm / (total + 1e-6), 1.0) : 1.0;
    // `fmin` ignores a NaN, which must not be lost.
    if (total != total) clip = is_finite(s.max_norm) ? not_a_number() : 1.0;
    double decay = s.ema_decay;
    if (s.ema_warmup != 0.0) decay = fmin(decay, (1.0 + c.ema_updates) / (10.0 + c.ema_updates));
    c.steps += 1.0;
    if (s.ema_decay >= 0.0) c.ema_updates += 1.0;
    double bias1 = 1.0 - pow(s.beta1, c.steps), bias2 = 1.0 - pow(s.beta2, c.steps);
    c.mean[0] = (float)s.beta1;
    c.mean[1] = (float)(1.0 - s.beta1);
    c.square[0] = (float)s.beta2;
    c.square[1] = (float)(1.0 - s.beta2);
    c.average[0] = (float)decay;
    c.average[1] = (float)(1.0 - decay);
    c.eps = (float)s.eps;
    c.step_size = (float)(*learning_rate / bias1);
    c.root_scale = (float)(1.0 / sqrt(bias2));
    c.keep = (float)(1.0 - *learning_rate * s.decoupled);
    c.l2 = (float)s.l2;
    c.gradient_scale = (float)(unscale * clip);
    c.momentum[0] = (float)s.momentum;
    c.momentum[1] = (float)(1.0 - s.momentum);
    c.nesterov = (float)s.nesterov;
    c.muon_keep = (float)(1.0 - *learning_rate * s.muon_decoupled);
    c.learning_rate = (float)*learning_rate;
    *control = c;
}

// Updates the weights of Adam.
extern "C" __global__ void update_weights(const Weight *weights, const Part *parts, const Control *control) {
    Control c = *control;
    if (c.skip != 0.0f) return;
    Weight own = weights[parts[blockIdx.x].weight];
    u64 first = (u64)parts[blockIdx.x].chunk * CHUNK;
    for (u64 i = first + threadIdx.x; i < own.count && i < first + CHUNK; i += THREADS) {
        float weight = own.weight[i];
        if (own.gradient) {
            float gradient = own.gradient[i] * c.gradient_scale + weight * c.l2;
            float mean = own.mean[i] * c.mean[0] + gradient * c.mean[1];
            float square = own.square[i] * c.square[0] + gradient * gradient * c.square[1];
            float root = sqrtf(square) * c.root_scale + c.eps;
            own.mean[i] = mean;
            own.square[i] = square;
            weight = weight * c.keep - mean * c.step_size / root;
            own.weight[i] = weight;
        }
        if (own.average) own.average[i] = own.average[i] * c.average[0] + weight * c.average[1];
    }
}

// Updates the momentum of Muon's matrices, whose parts begin at `parts`. Writes the matrices to be orthogonalised, and
// the sum of squares of the part of each block.
extern "C" __global__ void begin_matrices(
    const Weight *weights, const Part *parts, const Control *control, double *squares
) {
    __shared__ double sums[THREADS];
    Control c = *control;
    if (c.skip != 0.0f) return;
    Weight own = weights[parts[blockIdx.x].weight];
    u64 first = (u64)parts[blockIdx.x].chunk * CHUNK;
    double sum = 0.0;
    for (u64 i = first + threadIdx.x; own.gradient && i < own.count && i < first + CHUNK; i += THREADS) {
        float gradient = own.gradient[i] * c.gradient_scale;
        float mean = own.mean[i] * c.momentum[0] + gradient * c.momentum[1];
        own.mean[i] = mean;
        float direction = c.nesterov != 0.0f ? mean * c.momentum[0] + gradient * c.momentum[1] : mean;
        own.direction[i] = direction;
        sum += (double)direction * direction;
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// Updates matrices of Muon, whose parts begin at `parts`. `directions` is the memory of the first matrix to be
// orthogonalised, and `orthogonal` holds the results in the same order.
extern "C" __global__ void update_matrices(
    const Weight *weights, const Part *parts, const Control *control, const float *directions, const float *orthogonal
) {
    Control c = *control;
    if (c.skip != 0.0f) return;
    Weight own = weights[parts[blockIdx.x].weight];
    const float *update = orthogonal + (own.direction - directions);
    float size = c.learning_rate * (float)own.scale;
    u64 first = (u64)parts[blockIdx.x].chunk * CHUNK;
    for (u64 i = first + threadIdx.x; i < own.count && i < first + CHUNK; i += THREADS) {
        float weight = own.weight[i];
        if (own.gradient) {
            weight = weight * c.muon_keep - update[i] * size;
            own.weight[i] = weight;
        }
        if (own.average) own.average[i] = own.average[i] * c.average[0] + weight * c.average[1];
    }
}
