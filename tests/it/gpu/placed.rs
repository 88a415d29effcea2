//! After the start: whether engines are where they were planned, and whether they give their memory back.
