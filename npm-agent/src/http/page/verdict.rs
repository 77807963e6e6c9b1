//! The form that answers whether a connection is allowed, and why: by the code that answers `npm-agent matrix`.

use std::net::IpAddr;
use std::sync::Arc;

use maud::{Markup, html};
use npm_policy::flow::{Decision, Flow, Judgement, Verdict};
use npm_policy::model::{Pod, PodNetwork, PodPhase, Protocol};

use super::paging::Query;
use super::words::short;
use super::{Page, Seen, policies};
use crate::escape::Effect;
use crate::http::view::View;
use crate::matrix::{Pair, Probe, port_of};

/// How many pods the fields propose: those of this node first.
const MOST_PROPOSED: usize = 200;

const ICMP: &str = "ICMP";

pub(super) fn body(seen: &Seen) -> Markup {
    let query = &seen.query;
    html! {
        h1 { "Is it allowed?" }
        section { (form(seen, query)) }
        @if !query.from.is_empty() && !query.to.is_empty() {
            @match ask(&seen.view, query) {
                Ok(asked) => (answer(seen, &asked)),
                Err(why) => p.banner.warn #verdict { (short(&why)) },
            }
        }
    }
}

/// The form, filled in with what was asked.
pub(super) fn form(seen: &Seen, query: &Query) -> Markup {
    let protocols = Protocol::ALL.map(|protocol| protocol.to_string());
    let protocols = protocols.iter().map(String::as_str).chain([ICMP]);
    html! {
        form.verdict method="get" action=(Page::Verdict.path()) {
            label { span { "From" } input name="from" required list="pods" value=(query.from) placeholder="namespace/pod or address" autocomplete="off" spellcheck="false"; }
            label { span { "To" } input name="to" required list="pods" value=(query.to) placeholder="namespace/pod or address" autocomplete="off" spellcheck="false"; }
            label.brief { span { "Protocol" } select name="protocol" {
                @for protocol in protocols { option selected[protocol == query.protocol] { (protocol) } }
            } }
            label.brief { span { "Port" } input name="port" value=(query.port) placeholder="80 or http" autocomplete="off"; }
            button type="submit" { "Judge" }
            datalist #pods { @for name in proposed(&seen.view) { option value=(name); } }
        }
    }
}

fn proposed(view: &View) -> Vec<String> {
    let able = |pod: &&Arc<Pod>| match (pod.network, pod.phase) {
        (PodNetwork::Own, PodPhase::Active | PodPhase::Pending) => true,
        (PodNetwork::Own, PodPhase::Ended) | (PodNetwork::Host, _) => false,
    };
    let is_here = |pod: &&Arc<Pod>| pod.node.as_deref() == Some(&*view.node);
    let here = view.world.pods().filter(able).filter(is_here);
    let elsewhere = view.world.pods().filter(able).filter(|pod| !is_here(pod));
    here.chain(elsewhere).take(MOST_PROPOSED).map(|pod| pod.key.to_string()).collect()
}

/// What was asked, and the answer.
struct Asked {
    pair: Pair,
    flow: Flow,
    verdict: Verdict,
}

fn ask(view: &View, query: &Query) -> Result<Asked, String> {
    let Query { from, to, protocol, port, .. } = query;
    let probe = match Protocol::ALL.into_iter().find(|known| known.to_string() == *protocol) {
        Some(protocol) => match port_of(&view.world, to, protocol, port) {
            Some(port) => Probe::Port(protocol, port),
            None if port.is_empty() => return Err(format!("{protocol} needs a port")),
            None => {
                return Err(format!(
                    "{port:?} is neither a port from 1 to 65535 nor a {protocol} port's name on {to}"
                ));
            }
        },
        None if protocol == ICMP => Probe::Icmp,
        None => return Err(format!("{protocol:?} is no protocol that can be asked about")),
    };
    let pair = Pair::find(&view.world, from, to, probe).map_err(|error| error.to_string())?;
    let (flow, verdict) = pair.verdict(&view.world);
    Ok(Asked { pair, flow, verdict })
}

fn answer(seen: &Seen, asked: &Asked) -> Markup {
    let Asked { pair, flow, verdict } = asked;
    let (class, word) = match verdict.decision() {
        Decision::Allow => ("banner good", "Allowed"),
        Decision::Deny => ("banner bad", "Denied"),
    };
    html! {
        div #verdict class=(class) {
            strong { (word) } ": "
            span { (short(&pair.source.name)) " → " (short(&pair.destination.name)) " " (pair.probe) }
        }
        dl {
            div { dt { "Egress of the source" } dd { (judgement(&verdict.egress)) } }
            div { dt { "Ingress of the destination" } dd { (judgement(&verdict.ingress)) } }
            div { dt { "From" } dd { (end(&seen.view, flow.source)) } }
            div { dt { "To" } dd { (end(&seen.view, flow.destination)) } }
            div { dt { "This node's rules" } dd { (compiled(seen, asked)) } }
        }
        details {
            summary { "In one sentence" }
            p { (words_of(asked)) }
        }
        (doubts(seen))
    }
}

fn words_of(Asked { pair, flow, verdict }: &Asked) -> String {
    let text = pair.explain(verdict, flow.transport);
    super::words::cut(&text, 2000).to_owned()
}

fn judgement(judgement: &Judgement) -> Markup {
    match judgement {
        Judgement::NotIsolated => html! { span.state.good { "open" } " no policy isolates it" },
        Judgement::Allowed { by } => {
            html! { span.state.good { "allowed" } " by " (policies::first(by.iter())) }
        }
        Judgement::Denied { selected_by } => html! {
            span.state.bad { "denied" } " isolated by " (policies::first(selected_by.iter()))
            ", and nothing there allows it"
        },
    }
}

/// Who is at an address, and where.
fn end(view: &View, address: IpAddr) -> Markup {
    html! {
        code { (address) }
        @match view.world.holder(address) {
            Some(pod) => { ", pod " (short(&pod.key.to_string())) " on node " (short(pod.node.as_deref().unwrap_or("none"))) },
            None => ", no pod's address",
        }
    }
}

/// What this node's compiled rules say of the ends that are here: a second opinion, which must be the same.
fn compiled(seen: &Seen, Asked { flow, verdict, .. }: &Asked) -> Markup {
    let view = &*seen.view;
    let own = view.goal.verdict(flow);
    let is_here =
        |address| view.world.holder(address).is_some_and(|pod| pod.node.as_deref() == Some(&*view.node));
    let ends =
        [(flow.source, &own.egress, &verdict.egress), (flow.destination, &own.ingress, &verdict.ingress)];
    let mut here = ends.into_iter().filter(|(address, ..)| is_here(*address)).peekable();
    if here.peek().is_none() {
        return html! { span.quiet { "neither end is on this node" } };
    }
    match here.all(|(_, own, of_policies)| own == of_policies) {
        true => html! { span.state.good { "agree" } },
        false => {
            html! { span.state.bad { "differ" } " from what the policies say: " (own) ". Please report this as a defect." }
        }
    }
}

/// Why what policies say may not be what happens to packets.
fn doubts(seen: &Seen) -> Markup {
    let unjudged = seen.report.status.escapes.iter().any(|escape| escape.effect == Effect::Unjudged);
    html! {
        @if !seen.report.ready {
            p.banner.warn { "The agent is not ready: the kernel may not have all of this yet. " a href=(Page::Overview.path()) { "Why" } }
        } @else if unjudged {
            p.banner.warn { "Some traffic of this node escapes judgement. " a href=(Page::Overview.path()) { "Which" } }
        }
        p.quiet {
            "This is what policies say of a new connection, behind the translation of Services and before masquerading. Traffic \
             between a pod and its own node is never judged."
        }
    }
}
