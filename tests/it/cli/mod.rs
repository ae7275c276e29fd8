//! The program as it is run: its commands, and what they print.

mod commands;
mod manual;
mod operators;
