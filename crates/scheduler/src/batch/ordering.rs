//! Who goes first. The class always dominates: an earlier class is planned first and preempted
//! last under every policy. Within a class the policy decides who is admitted next.

use std::collections::BTreeMap;

use pomona_types::{Micros, QosClass, TenantId};

use super::record::Record;

/// A request that has waited this long is treated as the most urgent class, so that a stream of
/// more urgent ones cannot starve it.
pub(super) const STARVATION_AFTER: Micros = Micros(60_000_000);

/// The policy within a class.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ordering {
    /// First come, first served.
    #[default]
    Fcfs,
    /// Lowest `priority` first, then first come.
    Priority,
    /// The tenant that has been given the fewest tokens first (virtual token counter: Sheng et
    /// al., "Fairness in Serving Large Language Models", OSDI 2024), then first come.
    Fair,
}

/// Smaller goes first.
pub(super) type Rank = (QosClass, i64, u64);

/// Tokens given to each tenant that has requests.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares {
    /// Virtual time and number of requests alive.
    tenants: BTreeMap<TenantId, (u64, u32)>,
}

impl Shares {
    /// A tenant's request arrives. One that was away starts level with the least served.
    pub(super) fn enter(&mut self, tenant: TenantId) {
        let least = self.tenants.values().map(|(time, _)| *time).min().unwrap_or(0);
        self.tenants.entry(tenant).or_insert((least, 0)).1 += 1;
    }

    /// A tenant's request ends.
    pub(super) fn leave(&mut self, tenant: TenantId) {
        if let Some((_, alive)) = self.tenants.get_mut(&tenant) {
            *alive -= 1;
            if *alive == 0 {
                self.tenants.remove(&tenant);
            }
        }
    }

    /// A tenant is given tokens.
    pub(super) fn charge(&mut self, tenant: TenantId, tokens: u32) {
        if let Some((time, _)) = self.tenants.get_mut(&tenant) {
            *time += u64::from(tokens);
        }
    }

    fn time(&self, tenant: TenantId) -> i64 {
        self.tenants.get(&tenant).map_or(0, |(time, _)| *time as i64)
    }
}

impl Ordering {
    /// The rank in which waiting requests are admitted.
    pub(super) fn waiting(self, record: &Record, shares: &Shares) -> Rank {
        let within = match self {
            Ordering::Fcfs => 0,
            Ordering::Priority => i64::from(record.priority),
            Ordering::Fair => shares.time(record.tenant),
        };
        (record.class, within, record.arrival)
    }

    /// The rank in which running requests are planned; does not change while they run.
    pub(super) fn running(self, record: &Record) -> Rank {
        let within = match self {
            Ordering::Priority => i64::from(record.priority),
            Ordering::Fcfs | Ordering::Fair => 0,
        };
        (record.class, within, record.arrival)
    }
}
