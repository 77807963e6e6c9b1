//! Running programs: the agent's binary, and this test program again.

use std::path::PathBuf;
use std::process::{Command, Output};

/// What a program did.
pub(crate) struct Done {
    pub(crate) output: Output,
}

impl Done {
    pub(crate) fn code(&self) -> Option<i32> {
        self.output.status.code()
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8(self.output.stdout.clone()).unwrap()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8(self.output.stderr.clone()).unwrap()
    }
}

/// Runs the agent's binary with these arguments, without the environment's settings.
pub(crate) fn agent(arguments: &[&str]) -> Done {
    run(PathBuf::from(env!("CARGO_BIN_EXE_npm-agent")), arguments, &[])
}

/// Runs one test of this program in a process of its own, with a variable set.
pub(crate) fn this_test(name: &str, variable: &str) -> Done {
    run(std::env::current_exe().unwrap(), &["--exact", name, "--nocapture"], &[(variable, "1")])
}

fn run(program: PathBuf, arguments: &[&str], environment: &[(&str, &str)]) -> Done {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NPM_")) {
        command.env_remove(name);
    }
    let output = command.args(arguments).envs(environment.iter().copied()).output().unwrap();
    Done { output }
}
