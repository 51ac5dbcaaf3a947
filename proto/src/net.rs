//! TCP: tokio's, or in a simulation of the whole stack (`--cfg downpour_sim`, docs/simulation.md) that of a network that exists in memory.
//!
//! Everything that serves or connects goes through here, so that what is simulated is what is shipped.

#[cfg(not(downpour_sim))]
mod real;
#[cfg(downpour_sim)]
mod simulated;

#[cfg(not(downpour_sim))]
pub use real::*;
#[cfg(downpour_sim)]
pub use simulated::*;
