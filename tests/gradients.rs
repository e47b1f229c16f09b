//! Every weight learns: gradients exist, and agree with finite differences.

use candle_core::{DType, Device, Tensor};
use ddpm::{Denoiser, Dropout, Parameters, Result, UNet, UNetConfig};

/// A network, and the loss of a batch under it as training sees it, dropout included.
struct Problem {
    parameters: Parameters,
    unet: UNet,
    x_t: Tensor,
    t: Tensor,
    eps: Tensor,
}

impl Problem {
    fn new(config: &UNetConfig, batch: usize, dtype: DType) -> Result<Self> {
        let device = Device::Cpu;
        let parameters = Parameters::new(3, dtype, &device);
        let unet = parameters.build(config)?;
        let shape = (batch, config.channels, config.image_size, config.image_size);
        let wave = |frequency: f64| -> Result<Tensor> {
            let count = shape.0 * shape.1 * shape.2 * shape.3;
            let values: Vec<f64> = (0..count).map(|i| (i as f64 * frequency).sin() * 1.4).collect();
            Ok(Tensor::from_vec(values, shape, &device)?.to_dtype(dtype)?)
        };
        let t: Vec<u32> = (0..batch as u32).map(|k| (k * 601 + 150) % 1000).collect();
        let t = Tensor::new(t, &device)?;
        Ok(Self { parameters, unet, x_t: wave(1.7)?, t, eps: wave(2.3)? })
    }

    fn loss(&self) -> Result<Tensor> {
        let output = self.unet.forward_train(&self.x_t, &self.t, &Dropout::new(9, 0))?;
        Ok((output - &self.eps)?.sqr()?.mean_all()?)
    }

    /// Asserts that the gradients of `every`-th weights agree with the change of the loss along a
    /// random direction.
    fn finite_differences_agree(&self, every: usize) -> Result<()> {
        let gradients = self.loss()?.backward()?;
        for (i, (name, var)) in self.parameters.vars().iter().enumerate() {
            if i % every != 0 {
                continue;
            }
            let gradient = gradients.get(var).expect("a gradient");
            let weight = var.as_detached_tensor().copy()?;
            let count = weight.elem_count();
            let direction: Vec<f64> = (0..count)
                .map(|j| ((i + j * 7) as f64 * 0.9).cos() / (count as f64).sqrt())
                .collect();
            let direction = Tensor::from_vec(direction, weight.shape(), &Device::Cpu)?;
            let expected = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;

            let h = 1e-4;
            let mut moved = [0.0; 2];
            for (moved, h) in moved.iter_mut().zip([h, -h]) {
                var.set(&(&weight + (&direction * h)?)?)?;
                *moved = self.loss()?.to_scalar::<f64>()?;
            }
            var.set(&weight)?;
            let found = (moved[0] - moved[1]) / (2.0 * h);
            // The loss's own rounding over 2 h, and the third derivative's term.
            let limit = 1e-9 + 1e-5 * expected.abs();
            assert!(
                (found - expected).abs() < limit,
                "{name}: {expected} by backward, {found} by differences"
            );
        }
        Ok(())
    }

    fn every_weight_has_a_gradient(&self, weights: usize) -> Result<()> {
        let gradients = self.loss()?.backward()?;
        let vars = self.parameters.vars();
        for (name, var) in &vars {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let norm =
                gradient.sqr()?.sum_all()?.sqrt()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            assert!(norm > 1e-8 && norm.is_finite(), "{name}: gradient of norm {norm}");
        }
        let count: usize = vars.values().map(|var| var.elem_count()).sum();
        assert_eq!(count, weights);
        Ok(())
    }
}

#[test]
fn every_weight_of_mnist_learns() -> Result<()> {
    // The number of weights is the reference implementation's.
    Problem::new(&UNetConfig::mnist(), 2, DType::F32)?.every_weight_has_a_gradient(2_268_929)
}

#[test]
fn every_weight_of_cifar10_learns() -> Result<()> {
    Problem::new(&UNetConfig::cifar10(), 2, DType::F32)?.every_weight_has_a_gradient(21_355_395)
}

#[test]
fn gradients_of_mnist_agree_with_finite_differences() -> Result<()> {
    Problem::new(&UNetConfig::mnist(), 1, DType::F64)?.finite_differences_agree(6)
}

#[test]
fn gradients_of_cifar10_agree_with_finite_differences() -> Result<()> {
    // Its layers, attention and dropout, at fewer channels: the full one takes minutes in f64.
    let config = UNetConfig {
        hidden_dims: vec![16, 24, 32],
        image_size: 8,
        time_dim: 16,
        dropout: 0.3,
        ..UNetConfig::cifar10()
    };
    Problem::new(&config, 2, DType::F64)?.finite_differences_agree(1)
}
