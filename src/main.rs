//! The program. Everything that is said to a person or a script is said below [`cli`]; the library never prints.

#![deny(clippy::unwrap_used)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    let code = cli::main();
    virt_replica::wiring::end_connections();
    code
}
