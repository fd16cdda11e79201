//! The `kvpolicy` program.

fn main() -> std::process::ExitCode {
    kvpolicy_cli::run(kvpolicy::Registry::standard())
}
