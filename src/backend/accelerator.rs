use candle_core::{Device, Result};

/// A kind of device, other than the CPU, that this build can support: its feature, its name, and the constructor of
/// its first device.
type Kind = (&'static str, &'static str, fn(usize) -> Result<Device>);

const KINDS: [(bool, Kind); 2] = [
    (cfg!(feature = "cuda"), ("cuda", "CUDA", Device::new_cuda)),
    (cfg!(feature = "metal"), ("metal", "Metal", Device::new_metal)),
];

/// Returns the enabled features that name devices.
pub(crate) fn features() -> impl Iterator<Item = &'static str> {
    KINDS.into_iter().filter(|(built, _)| *built).map(|(_, (feature, ..))| feature)
}

/// Returns the name of the kind of device for which this was built, and its first device. Returns `None` in a build
/// for the CPU.
pub(crate) fn first() -> Option<(&'static str, Result<Device>)> {
    let (_, (_, name, new)) = KINDS.into_iter().find(|(built, _)| *built)?;
    Some((name, new(0)))
}
