//! What the page promises.

