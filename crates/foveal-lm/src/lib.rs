//! Language models built on the `foveal` attention engine.
