//! Commands as a user runs them.

mod command_line;
mod containers;
mod control_socket;
mod discovery;
mod doctor;
mod environment;
mod proxy_command;
mod sim_command;
mod status;
mod up;
