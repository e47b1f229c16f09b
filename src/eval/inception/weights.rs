use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};

use crate::backend::inference::Convolution;
use crate::error::{Error, Result};
use crate::kernels::op::conv::Scale;
use crate::model::tensor_file::{check_known, weight_of};

/// The `eps` of the network's batch normalisations.
const EPS: f64 = 1e-3;

/// The weights of a file, by the names of PyTorch's Inception.
pub(super) struct Weights<'a> {
    path: &'a Path,
    tensors: &'a BTreeMap<String, Tensor>,
    /// The names that belong to the network.
    known: RefCell<BTreeMap<String, ()>>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(path: &'a Path, tensors: &'a BTreeMap<String, Tensor>) -> Self {
        Self { path, tensors, known: RefCell::default() }
    }

    fn values(&self, name: String, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = weight_of(self.path, self.tensors, &name, shape)?;
        self.known.borrow_mut().insert(name, ());
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// A convolution, the batch normalisation that follows it, and a ReLU. With its fixed statistics, the normalisation
    /// is a factor and a shift of each channel, which become a part of the weights and the bias.
    ///
    /// # Errors
    /// Returns an error if a tensor is missing or has another shape, if a variance plus [`EPS`] is not positive, or if
    /// a weight or bias is then not finite.
    pub(super) fn convolution(
        &self,
        name: &str,
        [input, output]: [usize; 2],
        [height, width]: [usize; 2],
        scale: Scale,
    ) -> Result<Convolution> {
        let dims = [output, input, height, width];
        let mut weight = self.values(format!("{name}.conv.weight"), &dims)?;
        let of = |part: &str| self.values(format!("{name}.bn.{part}"), &[output]);
        let [factor, bias, mean, variance] =
            [of("weight")?, of("bias")?, of("running_mean")?, of("running_var")?];
        self.known.borrow_mut().insert(format!("{name}.bn.num_batches_tracked"), ());
        if let Some(variance) = variance.iter().find(|v| f64::from(**v) + EPS <= 0.0 || v.is_nan())
        {
            let reason = format!("{name}.bn.running_var has {variance}; it must be above -{EPS}");
            return Err(Error::data(self.path, reason));
        }
        let mut shift = vec![0f32; output];
        for (o, weight) in weight.chunks_exact_mut(dims[1..].iter().product()).enumerate() {
            let factor = f64::from(factor[o]) / (f64::from(variance[o]) + EPS).sqrt();
            weight.iter_mut().for_each(|weight| *weight = (f64::from(*weight) * factor) as f32);
            shift[o] = (f64::from(bias[o]) - f64::from(mean[o]) * factor) as f32;
        }
        self.check_finite(&format!("{name}.conv.weight, times the factor of {name}.bn"), &weight)?;
        self.check_finite(
            &format!("{name}.bn.bias, minus the scaled {name}.bn.running_mean"),
            &shift,
        )?;
        Convolution::new(&weight, dims, shift, scale, true)
    }

    /// The layer `fc` as a convolution of maps of one pixel, without its bias.
    pub(super) fn classifier(&self, [input, output]: [usize; 2]) -> Result<Convolution> {
        let weight = self.values("fc.weight".into(), &[output, input])?;
        self.check_finite("fc.weight", &weight)?;
        self.known.borrow_mut().insert("fc.bias".into(), ());
        let dims = [output, input, 1, 1];
        Convolution::new(&weight, dims, vec![0.0; output], Scale::Stride(1), false)
    }

    fn check_finite(&self, what: &str, values: &[f32]) -> Result<()> {
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => {
                Err(Error::data(self.path, format!("{what} has {value}; it must be finite")))
            }
            None => Ok(()),
        }
    }

    /// # Errors
    /// Returns an error if the file has a tensor that is not one of the network.
    pub(super) fn check_known(&self) -> Result<()> {
        check_known(self.path, self.tensors, &self.known.borrow())
    }
}
