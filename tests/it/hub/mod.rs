//! Models of Hugging Face: the check of access, and the download.

mod download;
mod fake_hub;
