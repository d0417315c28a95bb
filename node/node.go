// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"signalbox/proxier/plan"
)

// Name returns the name of this node's Node object: override, or the host name if
// that is empty, trimmed and in lower case.
func Name(override string) (string, error) {
	name := override
	if name == "" {
		host, err := os.Hostname()
		if err != nil {
			return "", fmt.Errorf("reading the host name: %w", err)
		}
		name = host
	}
	trimmed := strings.ToLower(strings.TrimSpace(name))
	if trimmed == "" {
		return "", errors.New("there are only spaces in the node's name")
	}
	return trimmed, nil
}

// FamilyUsable returns the reason why this node can serve no Service of a family,
// or nil.
func FamilyUsable(family plan.Family) error {
	if family == plan.IPv4 {
		return nil
	}
	disabled, err := Sysctl("net/ipv6/conf/all/disable_ipv6")
	switch {
	case err != nil:
		return fmt.Errorf("the kernel has no IPv6: %w", err)
	case disabled != "0":
		return errors.New("IPv6 is switched off (net.ipv6.conf.all.disable_ipv6)")
	}
	return nil
}
