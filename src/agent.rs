//! The agent: our program on the target. It obeys or refuses and never decides.
//!
//! [`wire`] has the words that both sides say, [`server`] is the agent, [`client`] a session with one on another host.
//! Protocol: docs/formats/wire.md.

pub mod client;
mod patience;
pub mod server;
pub mod wire;
