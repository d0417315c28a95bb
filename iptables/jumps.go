package iptables

import (
	"fmt"
	"slices"

	"github.com/coreos/go-iptables/iptables"
)

// jump is a rule in a built-in chain that leads to a chain of ours.
type jump struct {
	table  table
	from   string
	target string
	// newOnly limits the jump to the first packet of a connection.
	newOnly bool
	comment string
}

// jumps are kube-proxy's, in the order in which they are put in front of what
// a chain holds: the last comes first for a packet. Source ranges are looked
// at before anything else.
var jumps = []jump{
	{filter, "INPUT", externalServicesChain, true, "kubernetes externally-visible service portals"},
	{filter, "FORWARD", externalServicesChain, true, "kubernetes externally-visible service portals"},
	{filter, "INPUT", nodePortsChain, false, "kubernetes health check service ports"},
	{filter, "FORWARD", servicesChain, true, "kubernetes service portals"},
	{filter, "OUTPUT", servicesChain, true, "kubernetes service portals"},
	{filter, "FORWARD", forwardChain, false, "kubernetes forwarding rules"},
	{filter, "INPUT", proxyFirewallChain, true, "kubernetes load balancer firewall"},
	{filter, "OUTPUT", proxyFirewallChain, true, "kubernetes load balancer firewall"},
	{filter, "FORWARD", proxyFirewallChain, true, "kubernetes load balancer firewall"},
	{nat, "OUTPUT", servicesChain, false, "kubernetes service portals"},
	{nat, "PREROUTING", servicesChain, false, "kubernetes service portals"},
	{nat, "POSTROUTING", postroutingChain, false, "kubernetes postrouting rules"},
}

// args is the rule as the tools read it.
func (j jump) args() []string {
	var args []string
	if j.newOnly {
		args = append(args, "-m", "conntrack", "--ctstate", "NEW")
	}
	return append(args, "-m", "comment", "--comment", j.comment, "-j", j.target)
}

// rule is the same as a line of iptables-save has it after the chain.
func (j jump) rule() string {
	var s string
	if j.newOnly {
		s = " -m conntrack --ctstate NEW"
	}
	return s + comment(j.comment) + " -j " + j.target
}

// missingJumps are those of jumps that are not in the kernel, given what the
// tables hold. The tools are asked about one whose text is not found, because
// not all of their versions write the same.
func missingJumps(client *iptables.IPTables, held [tableCount]*listing) ([]jump, error) {
	var missing []jump
	for _, j := range jumps {
		l := held[j.table]
		if slices.Contains(l.builtin, "-A "+j.from+j.rule()) {
			continue
		}
		if slices.Contains(l.chains, j.target) {
			exists, err := client.Exists(j.table.String(), j.from, j.args()...)
			if err != nil {
				return nil, fmt.Errorf("jump from %s %s to %s: %w", j.table, j.from, j.target, err)
			}
			if exists {
				continue
			}
		}
		missing = append(missing, j)
	}
	return missing, nil
}

// firewallRule keeps other hosts from talking to 127.0.0.1, which the kernel
// lets them once route_localnet is set. It is the kubelet's rule, byte by byte,
// so that each finds the other's.
var firewallRule = []string{
	"-m", "comment", "--comment", "block incoming localnet connections",
	"--dst", "127.0.0.0/8", "!", "--src", "127.0.0.0/8",
	"-m", "conntrack", "!", "--ctstate", "RELATED,ESTABLISHED,DNAT", "-j", "DROP",
}

// addLocalnetFirewall adds firewallRule to the chain shared with the kubelet.
func addLocalnetFirewall(client *iptables.IPTables) error {
	table := filter.String()
	exists, err := client.ChainExists(table, firewallChain)
	if err == nil && !exists {
		err = client.NewChain(table, firewallChain)
	}
	if err == nil {
		err = client.AppendUnique(table, firewallChain, firewallRule...)
	}
	for _, from := range []string{"OUTPUT", "INPUT"} {
		if err == nil {
			err = client.InsertUnique(table, from, 1, "-j", firewallChain)
		}
	}
	if err != nil {
		return fmt.Errorf("chain %s: %w", firewallChain, err)
	}
	return nil
}

// isOurs says whether this mode writes and removes the chain, in some table.
func isOurs(name string) bool {
	return isServiceChain(name) || slices.Contains(fixedChains[nat], name) || slices.Contains(fixedChains[filter], name)
}
