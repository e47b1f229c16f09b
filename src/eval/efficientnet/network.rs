//! The layers of EfficientNet-lite0: those of EfficientNet-B0 (Tan and Le 2019, table 1), without squeeze and
//! excitation, and with ReLU6. The names are those of efficientnet-lite-pytorch.

use std::sync::Arc;

use crate::backend::inference::{Convolution, DepthwiseConvolution, Map, Step};
use crate::backend::maps::Pool;
use crate::error::Result;
use crate::eval::weights::Weights;
use crate::kernels::op::activation::Rectifier;
use crate::kernels::op::conv::Scale;
use crate::kernels::op::pool::Pooling;

/// Height and width of the input.
pub(super) const SIZE: usize = 224;
/// Features of an image.
pub(super) const FEATURES: usize = 1280;
/// Classes.
pub(super) const CLASSES: usize = 1000;

/// Channels after the first layer.
const STEM: usize = 32;
/// Height and width of the last map.
const LAST: usize = 7;

/// Blocks of one size of maps and number of channels.
struct Stage {
    blocks: usize,
    /// Height and width of the depthwise kernels.
    kernel: usize,
    /// Stride of the first block. The others have the stride 1.
    stride: usize,
    /// Channels of the depthwise convolution, as a multiple of those of the block's input.
    expansion: usize,
    /// Channels of the output.
    channels: usize,
}

const STAGES: [Stage; 7] = [
    Stage { blocks: 1, kernel: 3, stride: 1, expansion: 1, channels: 16 },
    Stage { blocks: 2, kernel: 3, stride: 2, expansion: 6, channels: 24 },
    Stage { blocks: 2, kernel: 5, stride: 2, expansion: 6, channels: 40 },
    Stage { blocks: 3, kernel: 3, stride: 2, expansion: 6, channels: 80 },
    Stage { blocks: 3, kernel: 5, stride: 1, expansion: 6, channels: 112 },
    Stage { blocks: 4, kernel: 5, stride: 2, expansion: 6, channels: 192 },
    Stage { blocks: 1, kernel: 3, stride: 1, expansion: 6, channels: 320 },
];

/// The network.
pub(super) struct Network {
    stem: Step,
    blocks: Vec<Block>,
    head: Step,
    classifier: Step,
}

impl Network {
    /// Builds the network.
    ///
    /// # Errors
    /// Returns an error if a weight is missing or has another shape.
    pub(super) fn new(weights: &Weights<'_>) -> Result<Self> {
        let layer = |[conv, norm]: [&str; 2], dims, scale| {
            let (weight, bias) = weights.normalized(conv, norm, dims)?;
            let layer = Convolution::new(weight, dims, bias, scale, Rectifier::Relu6)?;
            Ok::<_, crate::error::Error>(Step::Convolve(vec![layer]))
        };
        // The map has an even size, so all zeros of TensorFlow's padding "same" follow it.
        let stem = layer(["_conv_stem", "_bn0"], [STEM, 3, 3, 3], Scale::StrideFromEdge(2))?;
        let (mut blocks, mut channels) = (vec![], STEM);
        for stage in &STAGES {
            for i in 0..stage.blocks {
                let stride = if i == 0 { stage.stride } else { 1 };
                let prefix = format!("_blocks.{}.", blocks.len());
                blocks.push(Block::new(weights, &prefix, channels, stage, stride)?);
                channels = stage.channels;
            }
        }
        let head = layer(["_conv_head", "_bn1"], [FEATURES, channels, 1, 1], Scale::Stride(1))?;
        let weight = weights.values("_fc.weight", &[CLASSES, FEATURES])?;
        let bias = weights.values("_fc.bias", &[CLASSES])?;
        let dims = [CLASSES, FEATURES, 1, 1];
        let classifier = Convolution::new(weight, dims, bias, Scale::Stride(1), Rectifier::None)?;
        Ok(Self { stem, blocks, head, classifier: Step::Convolve(vec![classifier]) })
    }

    /// Computes the features (count, 1, 1, 1280) and the logits (count, 1, 1, 1000) of images (count, 224, 224, 3).
    ///
    /// # Errors
    /// Returns an error if there is not enough memory.
    pub(super) fn run(&self, pool: &Arc<Pool>, images: &Map) -> Result<[Map; 2]> {
        let mut x = self.stem.apply(pool, images)?;
        for block in &self.blocks {
            x = block.run(pool, x)?;
        }
        let mean = Step::Pool(Pooling::Average, LAST, Scale::StrideWithin(1));
        let features = mean.apply(pool, &self.head.apply(pool, &x)?)?;
        let logits = self.classifier.apply(pool, &features)?;
        Ok([features, logits])
    }
}

/// A mobile inverted bottleneck (Sandler et al. 2018): a convolution to more channels, a depthwise convolution, and a
/// convolution to few channels. The output is added to the input of the block if both have the same dimensions.
struct Block {
    /// Absent if the depthwise convolution has the channels of the input.
    expand: Option<Step>,
    depthwise: Step,
    project: Step,
    residual: bool,
}

impl Block {
    fn new(
        weights: &Weights<'_>,
        prefix: &str,
        input: usize,
        stage: &Stage,
        stride: usize,
    ) -> Result<Self> {
        let Stage { kernel, expansion, channels: output, .. } = *stage;
        let inner = expansion * input;
        let normalized = |layer: &str, norm: &str, dims| {
            weights.normalized(&format!("{prefix}{layer}"), &format!("{prefix}{norm}"), dims)
        };
        let pointwise = |layer: &str, norm: &str, [input, output]: [usize; 2], rectifier| {
            let dims = [output, input, 1, 1];
            let (weight, bias) = normalized(layer, norm, dims)?;
            Convolution::new(weight, dims, bias, Scale::Stride(1), rectifier)
        };
        let expand = match expansion {
            1 => None,
            _ => Some(pointwise("_expand_conv", "_bn0", [input, inner], Rectifier::Relu6)?),
        };
        let dims = [inner, 1, kernel, kernel];
        let (weight, bias) = normalized("_depthwise_conv", "_bn1", dims)?;
        let depthwise = DepthwiseConvolution::new(&weight, dims, bias, stride, Rectifier::Relu6);
        let project = pointwise("_project_conv", "_bn2", [inner, output], Rectifier::None)?;
        let residual = stride == 1 && input == output;
        let project = if residual { project.adding() } else { project };
        Ok(Self {
            expand: expand.map(|expand| Step::Convolve(vec![expand])),
            depthwise: Step::Depthwise(depthwise),
            project: Step::Convolve(vec![project]),
            residual,
        })
    }

    fn run(&self, pool: &Arc<Pool>, mut x: Map) -> Result<Map> {
        let inner = match &self.expand {
            Some(expand) => self.depthwise.apply(pool, &expand.apply(pool, &x)?)?,
            None => self.depthwise.apply(pool, &x)?,
        };
        if self.residual {
            self.project.run(&inner, &mut x, 0)?;
            return Ok(x);
        }
        self.project.apply(pool, &inner)
    }
}
