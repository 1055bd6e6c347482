//! Project tasks: test, ci, bench, fuzz.
fn main() {}
