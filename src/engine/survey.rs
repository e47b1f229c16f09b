use std::cell::{Cell, RefCell};

use candle_core::{DType, Device, Tensor};

use super::graph::{Engine, Graph, Normed, Sealed};
use crate::error::{Error, Result};
use crate::kernels::op::activation::VectorActivation;
use crate::kernels::op::conv::Add;
use crate::layers::{Classes, Conv2d, Embedding, GroupNorm, Linear, Sinusoids};

/// The properties of the weights of a network, which do not change after it is built.
#[derive(Debug, Clone)]
pub(crate) struct Weights {
    /// Whether a weight takes gradients.
    pub trainable: bool,
    /// Whether a weight is computed from other weights that take gradients.
    pub derived: bool,
    /// The dtype and the device of all weights. `None` if they differ, or if there are no weights.
    pub home: Option<(DType, Device)>,
    /// The classes of the network, if it has any.
    pub classes: Option<Classes>,
}

impl Weights {
    /// Determines the properties by a pass that computes nothing.
    ///
    /// # Errors
    /// Returns the errors of the network.
    pub fn of(graph: &impl Graph) -> Result<Self> {
        let survey = Survey::default();
        graph.run(&survey, &())?;
        let Survey { trainable, derived, mixed, home, classes } = survey;
        let home = home.into_inner().filter(|_| !mixed.get());
        let (trainable, derived, classes) = (trainable.get(), derived.get(), classes.get());
        Ok(Self { trainable, derived, home, classes })
    }
}

/// An engine that computes nothing, and visits every weight.
#[derive(Default)]
struct Survey {
    trainable: Cell<bool>,
    derived: Cell<bool>,
    mixed: Cell<bool>,
    home: RefCell<Option<(DType, Device)>>,
    classes: Cell<Option<Classes>>,
}

impl Survey {
    fn visit<const N: usize>(&self, weights: [&Tensor; N]) {
        for weight in weights {
            self.trainable.set(self.trainable.get() || weight.track_op());
            self.derived.set(self.derived.get() || weight.track_op() && !weight.is_variable());
            let mut home = self.home.borrow_mut();
            let (dtype, device) =
                home.get_or_insert_with(|| (weight.dtype(), weight.device().clone()));
            if *dtype != weight.dtype() || !device.same_device(weight.device()) {
                self.mixed.set(true);
            }
        }
    }
}

impl Sealed for Survey {}

impl Engine<'_> for Survey {
    type Map = ();

    fn conv_add(&self, conv: &Conv2d, _: &(), _: Add<'_, ()>) -> Result<()> {
        self.visit([&conv.weight, &conv.bias]);
        Ok(())
    }

    fn normed_conv_add(
        &self,
        normed: Normed<'_, '_, ()>,
        conv: &Conv2d,
        x: &(),
        add: Add<'_, ()>,
    ) -> Result<()> {
        self.visit([&normed.norm.weight, &normed.norm.bias]);
        self.conv_add(conv, x, add)
    }

    fn linear(&self, _: VectorActivation, linear: &Linear, _: &()) -> Result<()> {
        self.visit([&linear.weight, &linear.bias]);
        Ok(())
    }

    fn add_class(&self, embedding: &Embedding, _: &()) -> Result<()> {
        self.visit([&embedding.weight]);
        let own = embedding.classes();
        match self.classes.replace(Some(own)) {
            Some(other) if other != own => {
                let [own, other] = [own, other].map(|classes| format!("{classes:?}"));
                Err(Error::config("classes of an embedding", own, format!("{other}, as another's")))
            }
            _ => Ok(()),
        }
    }

    fn drop_maps(&self, _: &(), _: u16, _: f64) -> Result<()> {
        Ok(())
    }

    fn concatenate(&self, _: &(), _: &()) -> Result<()> {
        Ok(())
    }

    fn attention(&self, _: &(), _: usize) -> Result<()> {
        Ok(())
    }

    fn modulated_norm(&self, norm: &GroupNorm, _: &(), _: Option<&()>) -> Result<()> {
        self.visit([&norm.weight, &norm.bias]);
        Ok(())
    }

    fn drop_values(&self, _: &(), _: u16, _: f64) -> Result<()> {
        Ok(())
    }

    fn pool(&self, _: &()) -> Result<()> {
        Ok(())
    }

    fn upsample(&self, _: &()) -> Result<()> {
        Ok(())
    }

    fn sinusoids(&self, _: &Sinusoids) -> Result<()> {
        Ok(())
    }
}
