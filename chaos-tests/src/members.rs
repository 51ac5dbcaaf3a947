//! The group of coordinators changes while everything else goes on: one joins, one leaves for good.

use anyhow::{Context, Result};
use downpour_proto::v1;

use crate::cluster::TestCluster;
use crate::disk::SmallDisk;
use crate::proxy::Proxy;

impl TestCluster {
    /// Index of the coordinator that is reached there.
    pub(crate) fn coordinator_at(&self, address: &str) -> Option<usize> {
        let coordinators = &self.processes.coordinators;
        if self.network.is_none() {
            return coordinators.iter().position(|process| process.address() == address);
        }
        let mut proxies = self.proxies.iter().take(coordinators.len());
        proxies.position(|proxy| proxy.address().to_string() == address)
    }

    fn reached_at(&self, coordinator: usize) -> String {
        match &self.network {
            Some(_) => self.proxies[coordinator].address().to_string(),
            None => self.processes.coordinators[coordinator].address().to_owned(),
        }
    }

    /// Members of the group.
    pub(crate) fn members(&self) -> Result<Vec<v1::MemberView>> {
        Ok(self.runtime.block_on(self.coordinators.cluster())?.members)
    }

    /// Number of a coordinator in the group.
    pub(crate) fn member(&self, coordinator: usize) -> Result<u64> {
        let address = self.reached_at(coordinator);
        let members = self.members()?;
        let member = members.iter().find(|member| member.address == address);
        Ok(member.with_context(|| format!("no member is reached at {address}"))?.id)
    }

    /// Starts one more coordinator, the last one in every list, and has it let in: its number in the group. It does not vote yet.
    pub(crate) fn add_coordinator(&mut self) -> Result<u64> {
        let (number, at) = (self.processes.next_coordinator(), self.processes.coordinators.len());
        let name = format!("coordinator-{number}");
        let proxy = match &self.network {
            Some(network) => Some(Proxy::in_network(network, name.clone())?),
            None => None,
        };
        if !self.disks.is_empty() {
            let directory = self.processes.subdir(&format!("coordinators/{number}"))?;
            self.disks.push(SmallDisk::mount(&directory)?);
        }
        let advertise = proxy.as_ref().map(|proxy| proxy.address().to_string());
        let process = self.processes.join_coordinator(advertise)?;
        if let Some(proxy) = proxy {
            proxy.forward_to(process.address());
            self.proxies.insert(at, proxy);
        }
        let request =
            v1::AddCoordinatorRequest { id: 0, address: self.reached_at(at), dry_run: false };
        let added = self.runtime.block_on(self.coordinators.add_coordinator(request));
        Ok(added.with_context(|| format!("let {name} in"))?.id)
    }

    /// Has a member removed from the group; where the answer to that was lost, it was no member any more. Its process ends by itself, if it runs.
    pub(crate) fn remove_member(&self, id: u64) -> Result<()> {
        let request = v1::RemoveCoordinatorRequest { id, dry_run: false };
        let removed = self.runtime.block_on(self.coordinators.remove_coordinator(request));
        removed.map(drop).with_context(|| format!("remove member {id}"))
    }

    /// A coordinator that is no member any more, and whose process has ended, is gone. Whoever asks for it by its old address reaches another one.
    pub(crate) fn forget_coordinator(&mut self, coordinator: usize) {
        let process = self.processes.forget_coordinator(coordinator);
        self.old_logs.push(process.log().to_owned());
        if self.network.is_some() {
            self.old_proxies.push(self.proxies.remove(coordinator));
        }
        if !self.disks.is_empty() {
            self.disks.remove(coordinator);
        }
        let others = self.processes.coordinators.iter().cycle();
        for (proxy, process) in self.old_proxies.iter().zip(others) {
            proxy.refuse(false);
            proxy.move_to(process.name(), process.address());
        }
    }
}
