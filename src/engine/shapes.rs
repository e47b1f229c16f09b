//! The shapes that operations of an engine accept. Networks outside the crate call these operations, so each operation
//! checks its operands before a kernel relies on them.

use crate::error::{Error, Result};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear};

/// (batch, height, width, channels)
type Dims = (usize, usize, usize, usize);

fn refuse(what: &'static str, (n, h, w, c): Dims, expected: String) -> Result<()> {
    Err(Error::shape(what, [n, h, w, c], expected))
}

/// Checks the input of a convolution, and the values that are added to its output.
pub(super) fn conv(
    conv: &Conv2d,
    x: Dims,
    per_image: Option<Dims>,
    residual: Option<Dims>,
) -> Result<()> {
    let (n, h, w, channels) = x;
    if channels != conv.input() {
        let expected = format!("(batch, height, width, {})", conv.input());
        return refuse("the input of a convolution", x, expected);
    }
    let [h, w] = conv.output_size([h, w]);
    for (what, found, expected) in [
        ("the map of vectors added to a convolution", per_image, (n, 1, 1, conv.output())),
        ("the map added to a convolution", residual, (n, h, w, conv.output())),
    ] {
        if let Some(found) = found.filter(|&found| found != expected) {
            return refuse(what, found, format!("{expected:?}"));
        }
    }
    Ok(())
}

/// Checks the input of a normalisation.
pub(super) fn norm(norm: &GroupNorm, x: Dims) -> Result<()> {
    if x.3 == norm.channels() {
        return Ok(());
    }
    let expected = format!("(batch, height, width, {})", norm.channels());
    refuse("the input of a normalisation", x, expected)
}

/// Checks the input of a normalisation, and its scales and shifts.
pub(super) fn modulated_norm(layer: &GroupNorm, x: Dims, by: Option<Dims>) -> Result<()> {
    norm(layer, x)?;
    let expected = (x.0, 1, 1, 2 * layer.channels());
    match by.filter(|&by| by != expected) {
        None => Ok(()),
        Some(by) => refuse("the map of scales and shifts", by, format!("{expected:?}")),
    }
}

/// Checks the input of a linear layer.
pub(super) fn linear(linear: &Linear, x: Dims) -> Result<()> {
    if (x.1, x.2, x.3) == (1, 1, linear.input()) {
        return Ok(());
    }
    refuse("the input of a linear layer", x, format!("(batch, 1, 1, {})", linear.input()))
}

/// Checks the vectors to which those of classes are added.
pub(super) fn embedding(embedding: &Embedding, x: Dims) -> Result<()> {
    if (x.1, x.2, x.3) == (1, 1, embedding.dim()) {
        return Ok(());
    }
    refuse(
        "the vectors to which classes are added",
        x,
        format!("(batch, 1, 1, {})", embedding.dim()),
    )
}

/// Checks the two maps of a concatenation.
pub(super) fn concatenation(a: Dims, b: Dims) -> Result<()> {
    if (a.0, a.1, a.2) == (b.0, b.1, b.2) {
        return Ok(());
    }
    let expected = format!("({}, {}, {}, channels), as the first", a.0, a.1, a.2);
    refuse("the second map of a concatenation", b, expected)
}

/// Checks queries, keys and values.
pub(super) fn attention(qkv: Dims, heads: usize) -> Result<()> {
    if heads == 0 {
        return Err(Error::config("heads", heads, "at least 1"));
    }
    if qkv.3.is_multiple_of(3) && (qkv.3 / 3).is_multiple_of(heads) {
        return Ok(());
    }
    let expected = match heads {
        1 => "(batch, height, width, 3 channels)".into(),
        _ => format!("(batch, height, width, 3 channels), with channels for {heads} heads"),
    };
    refuse("the map of queries, keys and values", qkv, expected)
}

/// Checks a map whose height and width are halved.
pub(super) fn pooling(x: Dims) -> Result<()> {
    if x.1.is_multiple_of(2) && x.2.is_multiple_of(2) {
        return Ok(());
    }
    refuse("the map to be pooled", x, "(batch, even height, even width, channels)".into())
}
