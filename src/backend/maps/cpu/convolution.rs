//! Convolutions of maps, and of maps that are normalised first.

use super::{Buffer, ConvGradients, Cpu, Maps, Norm};
use crate::error::Result;
use crate::kernels::cpu::conv::algorithm::Input;
use crate::kernels::cpu::conv::epilogue::Epilogue;
use crate::kernels::cpu::conv::plan::Plan;
use crate::kernels::cpu::norm::modulated::Modulated;
use crate::kernels::cpu::norm::{Known, Stats};
use crate::kernels::cpu::reduce::{sum_over_batch, sums_by_image};
use crate::kernels::op::conv::{Add, ConvShape};
use crate::kernels::with_values;
use crate::layers::Conv2d;

impl Cpu<'_> {
    pub(super) fn plan(&self, conv: &Conv2d, x: [usize; 4]) -> Result<Plan> {
        let shape = ConvShape::new(x, conv.weight.dims(), conv.scale)?;
        Ok(Plan::new(self.isa, shape, self.math))
    }

    /// Returns the normalisation with these statistics.
    pub(super) fn known(&self, norm: &Norm<'_, Buffer>, statistics: &[Stats]) -> Result<Known> {
        self.normalization(norm, |norm, by| match by {
            None => norm.known(statistics),
            Some(by) => Modulated { norm, by }.known(statistics),
        })
    }

    pub(super) fn convolved(
        &self,
        conv: &Conv2d,
        plan: &Plan,
        x: Input<'_>,
        add: Add<'_, Buffer>,
    ) -> Result<Buffer> {
        let mut y = self.take(plan.output().iter().product())?;
        with_values([&conv.weight, &conv.bias], |[weight, bias]| {
            let epilogue = Epilogue {
                bias: Some(bias),
                add: add.map(|values| values.map(|values| &**values)),
                ..Epilogue::default()
            };
            if self.repack || conv.weight.track_op() {
                let mut workspace = self.workspace.borrow_mut();
                let weights = plan.pack(weight, &mut workspace);
                plan.forward(x, &weights, epilogue, &mut y);
                workspace.unpack(weights);
            } else {
                plan.forward(x, conv.packed.get(plan, weight), epilogue, &mut y);
            }
        })?;
        Ok(y)
    }

    pub(super) fn weight_gradients(
        &self,
        conv: &Conv2d,
        plan: &Plan,
        x: Input<'_>,
        dy: &Buffer,
        per_image: bool,
    ) -> Result<ConvGradients<Buffer>> {
        let [batch, _, _, channels] = plan.output();
        let sums = sums_by_image(dy, batch, channels);
        let bias = self.weight_gradient(&conv.bias, |d| sum_over_batch(&sums, d))?;
        let weight = self.weight_gradient(&conv.weight, |d| {
            plan.weight_gradient(x, dy, d, &mut self.workspace.borrow_mut());
        })?;
        let of_images = per_image.then(|| self.take(sums.len())).transpose()?.map(|mut d| {
            d.iter_mut().zip(&sums).for_each(|(d, sum)| *d = *sum as f32);
            d
        });
        Ok(([weight, bias], of_images))
    }
}
