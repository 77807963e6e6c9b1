//! Sets: those that this node's policies name, and one of them.

use std::net::IpAddr;

use maud::{Markup, html};
use npm_policy::goal::{Family, Member, Set, SetKey};

use super::paging::{PER_PAGE, Part, filter, link};
use super::words::{count, short};
use super::{Page, Seen, cell, number, policies, table};
use crate::http::debug::{family_name, member};

/// A link to a set.
pub(super) fn to(name: &str) -> Markup {
    html! { a href=(link(Page::Set, &[("name", name)])) { (short(name)) } }
}

pub(super) fn list(seen: &Seen) -> Markup {
    let (view, query) = (&*seen.view, &seen.query);
    let address = query.filter.parse::<IpAddr>().ok();
    let wanted = view.names.iter().filter_map(|(key, names)| Some((key, view.goal.sets.get(key)?, names)));
    let wanted = wanted.filter(|(key, set, names)| match address {
        Some(address) => holds(set, address),
        None => {
            let mut kernel = view.kernel_names(key, names);
            query.admits(&names.name) || kernel.any(|(_, name)| query.admits(name))
        }
    });
    let part = Part::of(query, wanted);
    let rows = part.rows().iter().map(|(key, set, names)| {
        vec![
            to(&names.name),
            number(set.v4.len()),
            number(set.v6.len()),
            html! { @for (_, name) in view.kernel_names(key, names) { div { code { (name) } } } },
        ]
    });
    html! {
        h1 { "Sets" }
        p.lead {
            "A set holds the addresses that one expression of a policy means now. The sets here are those that the policies \
             of this node name."
        }
        (filter(Page::Sets, query, "Part of a name, or an address that is in it"))
        (table(&["Set", "IPv4", "IPv6", "In the kernel (ipset)"], rows))
        (part.navigation(Page::Sets, query))
    }
}

/// Whether a set means this address.
fn holds(set: &Set, address: IpAddr) -> bool {
    let mut members = set.family(Family::of(address)).iter();
    let in_some = |member: &Member| match member {
        Member::Address(held) | Member::Port(held, ..) => *held == address,
        Member::Include(net) => net.contains(&address),
        Member::Except(_) => false,
    };
    let in_except = |member: &Member| match member {
        Member::Except(net) => net.contains(&address),
        Member::Address(_) | Member::Port(..) | Member::Include(_) => false,
    };
    members.clone().any(in_some) && !members.any(in_except)
}

pub(super) fn one(seen: &Seen) -> Markup {
    let (view, query) = (&*seen.view, &seen.query);
    let found = view.names.iter().find(|(_, names)| *names.name == *query.name);
    let found = found.and_then(|(key, names)| Some((key, names, view.goal.sets.get(key)?)));
    let Some((key, names, set)) = found else {
        return html! {
            h1 { "Set" }
            p.banner.warn { "No policy of this node names a set " (short(&query.name)) "." }
            p { a href=(Page::Sets.path()) { "All sets" } }
        };
    };
    let members = Family::BOTH.into_iter().flat_map(|family| set.family(family).iter().map(member));
    let members: Vec<String> = members.filter(|text| query.admits(text)).collect();
    let part = Part::of(query, members.iter());
    let rows = part.rows().iter().map(|text| vec![html! { code { (text) } }, holder(seen, text)]);
    html! {
        h1 { "Set " (short(&names.name)) }
        dl {
            @for (family, kernel) in view.kernel_names(key, names) {
                div { dt { (family_name(family)) } dd {
                    (count(set.family(family).len())) " members, " code { (kernel) }
                } }
            }
            div { dt { "Used by" } dd { (users(seen, key)) } }
        }
        h2 { "Members" }
        (filter(Page::Set, query, "Containing"))
        (table(&["Member", "Pod"], rows))
        (part.navigation(Page::Set, query))
    }
}

/// The pod behind a member, if it is one's.
fn holder(seen: &Seen, member: &str) -> Markup {
    let address = member.split(',').next().and_then(|address| address.parse().ok());
    cell(match address.and_then(|address| seen.view.world.holder(address)) {
        Some(pod) => short(&pod.key.to_string()),
        None => String::new(),
    })
}

fn users(seen: &Seen, key: &SetKey) -> Markup {
    let programs = seen.view.goal.programs.iter();
    let users = programs.filter(|(_, program)| policies::named(program).any(|named| named == key));
    let users: Vec<_> = users.map(|(policy, _)| policy).take(PER_PAGE).collect();
    policies::first(users.into_iter())
}
