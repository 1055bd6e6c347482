//! The `foveal` command.
fn main() {}
