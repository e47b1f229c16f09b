//! The layers of Inception v3 (Szegedy et al. 2016, table 1), by PyTorch's names, and the differences of the network
//! with which the Fréchet distance is computed.

use std::sync::Arc;

use crate::backend::inference::{Convolution, Map, Step};
use crate::backend::maps::Pool;
use crate::error::Result;
use crate::eval::weights::Weights;
use crate::kernels::op::activation::Rectifier;
use crate::kernels::op::conv::Scale;
use crate::kernels::op::pool::Pooling;

/// Height and width of the input.
pub(super) const SIZE: usize = 299;
/// Features of an image.
pub(super) const FEATURES: usize = 2048;
/// Classes.
pub(super) const CLASSES: usize = 1008;

const SAME: Scale = Scale::Stride(1);
const WITHIN: Scale = Scale::StrideWithin(1);
const HALF: Scale = Scale::StrideWithin(2);

/// The pooling that halves height and width.
const HALVED: Step = Step::Pool(Pooling::Max, 3, HALF);
/// The pooling of the blocks. Zeros beyond the edge do not count, as in TensorFlow, and unlike in torchvision.
const AVERAGED: Step = Step::Pool(Pooling::Average, 3, SAME);
/// The pooling of the last block, for which the paper has the average. The weights were trained with it.
const GREATEST: Step = Step::Pool(Pooling::Max, 3, SAME);

/// Height and width of the last map.
const LAST: usize = 8;

/// A part of the network: branches that compute from the same map, each a list of steps. Their outputs are the channels
/// of the next map, in the order of the branches.
type Block = Vec<Vec<Step>>;

/// A function that makes the branches of a block.
type Part<'a> = &'a dyn Fn(Start<'a>) -> Result<Vec<Branch<'a>>>;

/// The network.
pub(super) struct Network {
    blocks: Vec<Block>,
    classifier: Step,
}

impl Network {
    /// Builds the network.
    ///
    /// # Errors
    /// Returns an error if a weight is missing or has another shape.
    pub(super) fn new(weights: &Weights<'_>) -> Result<Self> {
        let parts: [(&str, Part<'_>); 12] = [
            ("", &stem),
            ("Mixed_5b.", &|start| of_35(start, 32)),
            ("Mixed_5c.", &|start| of_35(start, 64)),
            ("Mixed_5d.", &|start| of_35(start, 64)),
            ("Mixed_6a.", &to_17),
            ("Mixed_6b.", &|start| of_17(start, 128)),
            ("Mixed_6c.", &|start| of_17(start, 160)),
            ("Mixed_6d.", &|start| of_17(start, 160)),
            ("Mixed_6e.", &|start| of_17(start, 192)),
            ("Mixed_7a.", &to_8),
            ("Mixed_7b.", &|start| of_8(start, AVERAGED)),
            ("Mixed_7c.", &|start| of_8(start, GREATEST)),
        ];
        let (mut blocks, mut channels): (Vec<Block>, usize) = (vec![], 3);
        for (prefix, part) in parts {
            let branches = part(Start { weights, prefix, channels })?;
            channels = branches.iter().map(|branch| branch.channels).sum();
            blocks.push(branches.into_iter().map(|branch| branch.steps).collect());
        }
        blocks.push(vec![vec![Step::Pool(Pooling::Average, LAST, WITHIN)]]);
        Ok(Self { blocks, classifier: Step::Convolve(vec![classifier(weights)?]) })
    }

    /// Computes the features (count, 1, 1, 2048) and the logits (count, 1, 1, 1008) of images (count, 299, 299, 3).
    ///
    /// # Errors
    /// Returns an error if there is not enough memory.
    pub(super) fn run(&self, pool: &Arc<Pool>, images: Map) -> Result<[Map; 2]> {
        let mut x = images;
        for block in &self.blocks {
            x = compute(block, pool, &x)?;
        }
        let logits = self.classifier.apply(pool, &x)?;
        Ok([x, logits])
    }
}

/// Computes the output of a block.
fn compute(block: &Block, pool: &Arc<Pool>, x: &Map) -> Result<Map> {
    let output =
        |branch: &Vec<Step>| branch.iter().try_fold(x.dims, |dims, step| step.output(dims));
    let outputs = block.iter().map(output).collect::<Result<Vec<_>>>()?;
    let mut dims = outputs[0];
    dims[3] = outputs.iter().map(|dims| dims[3]).sum();
    let (mut y, mut first) = (Map::take(pool, dims)?, 0);
    for (branch, output) in block.iter().zip(outputs) {
        let mut between: Option<Map> = None;
        for (i, step) in branch.iter().enumerate() {
            let input = between.as_ref().unwrap_or(x);
            if i + 1 == branch.len() {
                step.run(input, &mut y, first)?;
            } else {
                between = Some(step.apply(pool, input)?);
            }
        }
        first += output[3];
    }
    Ok(y)
}

/// A convolution, the batch normalisation that follows it, and a ReLU.
fn convolution(
    weights: &Weights<'_>,
    name: &str,
    [input, output]: [usize; 2],
    [height, width]: [usize; 2],
    scale: Scale,
) -> Result<Convolution> {
    let dims = [output, input, height, width];
    let (weight, bias) =
        weights.normalized(&format!("{name}.conv"), &format!("{name}.bn"), dims)?;
    Convolution::new(weight, dims, bias, scale, Rectifier::Relu)
}

/// The layer `fc` as a convolution of maps of one pixel, without its bias.
fn classifier(weights: &Weights<'_>) -> Result<Convolution> {
    let weight = weights.values("fc.weight", &[CLASSES, FEATURES])?;
    weights.allow("fc.bias");
    let dims = [CLASSES, FEATURES, 1, 1];
    Convolution::new(weight, dims, vec![0.0; CLASSES], SAME, Rectifier::None)
}

/// The start of the branches of a block.
#[derive(Clone, Copy)]
struct Start<'a> {
    weights: &'a Weights<'a>,
    /// The beginning of the names of the block's layers.
    prefix: &'a str,
    channels: usize,
}

impl<'a> Start<'a> {
    fn branch(self) -> Branch<'a> {
        Branch { start: self, channels: self.channels, steps: vec![] }
    }

    fn conv(self, layer: &str, channels: usize, kernel: [usize; 2]) -> Result<Branch<'a>> {
        self.branch().conv(layer, channels, kernel)
    }
}

/// A branch of a block.
struct Branch<'a> {
    start: Start<'a>,
    /// Channels of the output of the last step.
    channels: usize,
    steps: Vec<Step>,
}

impl Branch<'_> {
    fn pool(mut self, pooling: Step) -> Self {
        self.steps.push(pooling);
        self
    }

    /// Adds a convolution whose output has the size of its input.
    fn conv(self, layer: &str, channels: usize, kernel: [usize; 2]) -> Result<Self> {
        self.convs(&[(layer, kernel)], channels, SAME)
    }

    /// Adds a convolution of 3 x 3 that stays within the map.
    fn conv_within(self, layer: &str, channels: usize, scale: Scale) -> Result<Self> {
        self.convs(&[(layer, [3, 3])], channels, scale)
    }

    /// Adds convolutions of the same map, with as many channels each.
    fn convs(
        mut self,
        layers: &[(&str, [usize; 2])],
        channels: usize,
        scale: Scale,
    ) -> Result<Self> {
        let Start { weights, prefix, .. } = self.start;
        let convolution = |(layer, kernel): &(&str, [usize; 2])| {
            let (name, channels) = (format!("{prefix}{layer}"), [self.channels, channels]);
            convolution(weights, &name, channels, *kernel, scale)
        };
        let convolutions = layers.iter().map(convolution).collect::<Result<Vec<_>>>()?;
        self.steps.push(Step::Convolve(convolutions));
        self.channels = layers.len() * channels;
        Ok(self)
    }
}

/// The layers before the first block: maps of 149, 147, 73, 71 and 35 pixels.
fn stem(start: Start<'_>) -> Result<Vec<Branch<'_>>> {
    let stem = start
        .branch()
        .conv_within("Conv2d_1a_3x3", 32, HALF)?
        .conv_within("Conv2d_2a_3x3", 32, WITHIN)?
        .conv("Conv2d_2b_3x3", 64, [3, 3])?
        .pool(HALVED)
        .conv("Conv2d_3b_1x1", 80, [1, 1])?
        .conv_within("Conv2d_4a_3x3", 192, WITHIN)?
        .pool(HALVED);
    Ok(vec![stem])
}

/// A block of maps of 35 x 35 pixels: figure 5 of the paper, with one kernel of 5 x 5.
fn of_35(start: Start<'_>, pooled: usize) -> Result<Vec<Branch<'_>>> {
    Ok(vec![
        start.conv("branch1x1", 64, [1, 1])?,
        start.conv("branch5x5_1", 48, [1, 1])?.conv("branch5x5_2", 64, [5, 5])?,
        start.conv("branch3x3dbl_1", 64, [1, 1])?.conv("branch3x3dbl_2", 96, [3, 3])?.conv(
            "branch3x3dbl_3",
            96,
            [3, 3],
        )?,
        start.branch().pool(AVERAGED).conv("branch_pool", pooled, [1, 1])?,
    ])
}

/// The block from 35 x 35 to 17 x 17 pixels: figure 10 of the paper.
fn to_17(start: Start<'_>) -> Result<Vec<Branch<'_>>> {
    Ok(vec![
        start.branch().conv_within("branch3x3", 384, HALF)?,
        start.conv("branch3x3dbl_1", 64, [1, 1])?.conv("branch3x3dbl_2", 96, [3, 3])?.conv_within(
            "branch3x3dbl_3",
            96,
            HALF,
        )?,
        start.branch().pool(HALVED),
    ])
}

/// A block of maps of 17 x 17 pixels: figure 6 of the paper. The inner maps have `inner` channels.
fn of_17(start: Start<'_>, inner: usize) -> Result<Vec<Branch<'_>>> {
    Ok(vec![
        start.conv("branch1x1", 192, [1, 1])?,
        start.conv("branch7x7_1", inner, [1, 1])?.conv("branch7x7_2", inner, [1, 7])?.conv(
            "branch7x7_3",
            192,
            [7, 1],
        )?,
        start
            .conv("branch7x7dbl_1", inner, [1, 1])?
            .conv("branch7x7dbl_2", inner, [7, 1])?
            .conv("branch7x7dbl_3", inner, [1, 7])?
            .conv("branch7x7dbl_4", inner, [7, 1])?
            .conv("branch7x7dbl_5", 192, [1, 7])?,
        start.branch().pool(AVERAGED).conv("branch_pool", 192, [1, 1])?,
    ])
}

/// The block from 17 x 17 to 8 x 8 pixels.
fn to_8(start: Start<'_>) -> Result<Vec<Branch<'_>>> {
    Ok(vec![
        start.conv("branch3x3_1", 192, [1, 1])?.conv_within("branch3x3_2", 320, HALF)?,
        start
            .conv("branch7x7x3_1", 192, [1, 1])?
            .conv("branch7x7x3_2", 192, [1, 7])?
            .conv("branch7x7x3_3", 192, [7, 1])?
            .conv_within("branch7x7x3_4", 192, HALF)?,
        start.branch().pool(HALVED),
    ])
}

/// A block of maps of 8 x 8 pixels: figure 7 of the paper.
fn of_8(start: Start<'_>, pooling: Step) -> Result<Vec<Branch<'_>>> {
    Ok(vec![
        start.conv("branch1x1", 320, [1, 1])?,
        start.conv("branch3x3_1", 384, [1, 1])?.convs(
            &[("branch3x3_2a", [1, 3]), ("branch3x3_2b", [3, 1])],
            384,
            SAME,
        )?,
        start.conv("branch3x3dbl_1", 448, [1, 1])?.conv("branch3x3dbl_2", 384, [3, 3])?.convs(
            &[("branch3x3dbl_3a", [1, 3]), ("branch3x3dbl_3b", [3, 1])],
            384,
            SAME,
        )?,
        start.branch().pool(pooling).conv("branch_pool", 192, [1, 1])?,
    ])
}
