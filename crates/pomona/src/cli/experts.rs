//! Flags about experts, of models that have such.

use std::path::PathBuf;

use clap::Args;

/// How experts are divided over ranks.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Parallelism")]
pub struct ExpertArgs {
    /// Divide experts, whole ones each, over the ranks that share layers. That is how they are
    /// divided in any case: the flag refuses models and divisions where there is nothing to divide
    #[arg(long, visible_alias = "ep")]
    pub enable_expert_parallel: bool,
    /// Copies of experts in each layer, beyond one of each: on other ranks, of those that get most
    /// tokens by --expert-loads, where the busiest rank then has less to do
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(0..=65_536))]
    pub num_redundant_experts: u32,
    /// A file that keeps how many tokens each expert got. It is read at the start if it is there,
    /// and experts are placed by it; what is counted from then on is added to it
    #[arg(long, value_name = "FILE")]
    pub expert_loads: Option<PathBuf>,
    /// Leave the file of --expert-loads as it is
    #[arg(long, requires = "expert_loads")]
    pub expert_loads_read_only: bool,
}

impl ExpertArgs {
    /// The flags that were given, as they are written.
    pub fn given(&self) -> Vec<&'static str> {
        let all = [
            ("--enable-expert-parallel", self.enable_expert_parallel),
            ("--num-redundant-experts", self.num_redundant_experts > 0),
            ("--expert-loads", self.expert_loads.is_some()),
            ("--expert-loads-read-only", self.expert_loads_read_only),
        ];
        all.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }

    /// The flags that ask for the same.
    pub fn to_flags(&self) -> Vec<String> {
        let divide = self.enable_expert_parallel.then(|| "--enable-expert-parallel".to_owned());
        let copies = ["--num-redundant-experts".to_owned(), self.num_redundant_experts.to_string()];
        let loads = self.expert_loads.as_ref();
        let loads = loads.map(|file| ["--expert-loads".to_owned(), file.display().to_string()]);
        let fixed = self.expert_loads_read_only.then(|| "--expert-loads-read-only".to_owned());
        let loads = loads.into_iter().flatten().chain(fixed);
        divide.into_iter().chain(copies).chain(loads).collect()
    }
}
