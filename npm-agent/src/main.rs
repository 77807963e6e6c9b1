//! The npm-agent binary.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    npm_agent::cli::main()
}
