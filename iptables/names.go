// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"crypto/sha256"
	"encoding/base32"
	"slices"
	"strconv"
	"strings"

	"signalbox/proxier/plan"
)

// table is an iptables table that this mode writes to.
type table uint8

const (
	nat table = iota
	filter
	tableCount
)

var tableNames = [tableCount]string{nat: "nat", filter: "filter"}

func (t table) String() string { return tableNames[t] }

// The chains that built-in chains jump to, and those that other software uses.
const (
	servicesChain         = "KUBE-SERVICES"
	externalServicesChain = "KUBE-EXTERNAL-SERVICES"
	nodePortsChain        = "KUBE-NODEPORTS"
	forwardChain          = "KUBE-FORWARD"
	proxyFirewallChain    = "KUBE-PROXY-FIREWALL"
	postroutingChain      = "KUBE-POSTROUTING"
	markMasqChain         = "KUBE-MARK-MASQ"
	// firewallChain is shared with the kubelet: rules are added to it where
	// they are missing, and it is never removed.
	firewallChain = "KUBE-FIREWALL"
)

// fixedChains are the chains of each table that exist once.
var fixedChains = [tableCount][]string{
	nat:    {servicesChain, nodePortsChain, postroutingChain, markMasqChain},
	filter: {servicesChain, externalServicesChain, nodePortsChain, forwardChain, proxyFirewallChain},
}

// The prefixes of chains that belong to one ServicePort, followed by the hash
// of its name.
const (
	clusterPrefix  = "KUBE-SVC-" // an endpoint set
	localPrefix    = "KUBE-SVL-" // an endpoint set for outside traffic only
	externalPrefix = "KUBE-EXT-" // chooses a set by traffic source, masquerades
	sourcesPrefix  = "KUBE-FW-"  // allows source ranges
	endpointPrefix = "KUBE-SEP-" // one endpoint
)

// Chains of this mode alone. kube-proxy removes them, because they have
// prefixes of its own. The 0 after these is in no hash, and sorts before all of
// them: see xtables.Script.Add.
const (
	externalPortsChain = externalPrefix + "0NP"
	hairpinChain       = clusterPrefix + "0HP"
	routeSourcesChain  = clusterPrefix + "0SRC"
	digestPrefix       = clusterPrefix + "0D-"
)

// servicePrefixes are all prefixes under which chains come and go, with those
// that earlier releases of kube-proxy used.
var servicePrefixes = []string{clusterPrefix, localPrefix, externalPrefix, sourcesPrefix, endpointPrefix, "KUBE-XLB-"}

func isServiceChain(name string) bool {
	return slices.ContainsFunc(servicePrefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

// isOurs says whether this mode writes and removes the chain, in some table.
func isOurs(name string) bool {
	return isServiceChain(name) || slices.Contains(fixedChains[nat], name) || slices.Contains(fixedChains[filter], name)
}

// hash is the part of a chain name after its prefix: 80 bits of SHA-256.
func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base32.StdEncoding.EncodeToString(sum[:10])
}

// portHash is the hash in the names of one ServicePort's chains. The first
// chain with a prefix has kube-proxy's name for it, so that a takeover replaces
// its contents in place. The others are numbered.
func portHash(n plan.ServicePortName, ordinal int) string {
	s := n.String() + n.Protocol.String()
	if ordinal > 0 {
		s += "#" + strconv.Itoa(ordinal)
	}
	return hash(s)
}

// endpointChain is also the name of the endpoint's list of clients. It is the
// name that kube-proxy gives, so that affinity survives a takeover in both directions.
func endpointChain(n plan.ServicePortName, e plan.Endpoint) string {
	return endpointPrefix + hash(n.String()+n.Protocol.String()+e.AddrPort.String())
}

// bucketChain is one part of an endpoint set that is too large for one chain.
func bucketChain(set string, bucket int) string {
	return clusterPrefix + hash(set+"/"+strconv.Itoa(bucket))
}

// comment is the match that carries text for people. Names may come from
// manifests that nobody has validated: they must not end the quotation or the
// line.
func comment(text string) string {
	const limit = 240 // the kernel keeps 255 bytes
	if len(text) > limit {
		text = text[:limit]
	}
	clean := func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return '?'
		}
		return r
	}
	return ` -m comment --comment "` + strings.Map(clean, text) + `"`
}
