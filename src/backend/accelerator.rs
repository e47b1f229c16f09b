use candle_core::{Device, Result};

/// The kinds of devices, other than the CPU, for which this was built: feature, name, and constructor of the first
/// device.
type Kind = (&'static str, &'static str, fn(usize) -> Result<Device>);

const KINDS: [(bool, Kind); 2] = [
    (cfg!(feature = "cuda"), ("cuda", "CUDA", Device::new_cuda)),
    (cfg!(feature = "metal"), ("metal", "Metal", Device::new_metal)),
];

/// The features of this build that name devices.
pub(crate) fn features() -> impl Iterator<Item = &'static str> {
    KINDS.into_iter().filter(|(built, _)| *built).map(|(_, (feature, ..))| feature)
}

/// The name of the kind of device for which this was built, and the first device of this kind. `None` in a build for
/// the CPU.
pub(crate) fn first() -> Option<(&'static str, Result<Device>)> {
    let (_, (_, name, new)) = KINDS.into_iter().find(|(built, _)| *built)?;
    Some((name, new(0)))
}
