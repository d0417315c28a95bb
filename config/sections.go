// SPDX-License-Identifier: Apache-2.0

package config

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/modes"
)

// section is the part of kube-proxy's form that one mode reads. kube-proxy has
// several fields for one meaning there, each for some modes.
type section struct {
	// field names the section in the file; its flags begin with flags.
	field, flags string

	syncPeriod, minSyncPeriod *metav1.Duration
	// masqueradeField names the section that masqueradeBit and masqueradeAll are in.
	masqueradeField string
	masqueradeBit   *int32
	masqueradeAll   *bool
}

// sections lists all. The first is for modes that have none of their own.
func sections(k *v1alpha1.KubeProxyConfiguration) []section {
	ipt, nft, ipvs := &k.IPTables, &k.NFTables, &k.IPVS
	return []section{
		{"iptables", "iptables", &ipt.SyncPeriod, &ipt.MinSyncPeriod, "iptables", ipt.MasqueradeBit, &ipt.MasqueradeAll},
		{"nftables", "iptables", &nft.SyncPeriod, &nft.MinSyncPeriod, "nftables", nft.MasqueradeBit, &nft.MasqueradeAll},
		{"ipvs", "ipvs", &ipvs.SyncPeriod, &ipvs.MinSyncPeriod, "iptables", ipt.MasqueradeBit, &ipt.MasqueradeAll},
	}
}

// sectionOf returns the section that the configured mode reads.
func sectionOf(k *v1alpha1.KubeProxyConfiguration) section {
	all := sections(k)
	for _, s := range all {
		if s.field == modes.TraitsOf(string(k.Mode)).FileSection {
			return s
		}
	}
	return all[0]
}

// clearUnread clears what the mode does not read in the sections of other modes.
func clearUnread(k *v1alpha1.KubeProxyConfiguration) {
	read := sectionOf(k)
	for _, s := range sections(k) {
		if s.field != read.field {
			*s.syncPeriod, *s.minSyncPeriod = metav1.Duration{}, metav1.Duration{}
		}
		if s.masqueradeField != read.masqueradeField {
			*s.masqueradeAll = false
		}
	}
}
