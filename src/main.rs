//! The `xpyd` program: everything is in the library.

fn main() {}
