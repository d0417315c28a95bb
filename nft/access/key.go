// SPDX-License-Identifier: Apache-2.0

package access

import (
	"encoding/binary"
	"net/netip"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// FrontendBytes is the key of a frontend in sets and maps. NodePorts have no address.
func FrontendBytes(k plan.FrontendKey) string {
	b := make([]byte, 0, 24)
	if k.Addr.IsValid() {
		b = nft.AppendAddr(b, k.Addr)
	}
	return string(nft.AppendPort(nft.AppendProto(b, k.Protocol), k.Port))
}

// frontendOf reads a key.
func frontendOf(f *nft.IPFamily, fields []nft.Field, key []byte) plan.FrontendKey {
	var k plan.FrontendKey
	for _, field := range fields {
		n := field.Size(f)
		if len(key) < n {
			return plan.FrontendKey{}
		}
		switch field {
		case nft.AddrField:
			k.Addr, _ = netip.AddrFromSlice(key[:n])
		case nft.ProtoField:
			k.Protocol = plan.Protocol(key[0])
		case nft.PortField:
			k.Port = binary.BigEndian.Uint16(key)
		}
		key = key[n:]
	}
	return k
}

// FrontendOfBytes reads what FrontendBytes writes, for a NodePort without the address.
func FrontendOfBytes(f *nft.IPFamily, key []byte, byNodePort bool) plan.FrontendKey {
	if byNodePort {
		return frontendOf(f, NodePortKey, key)
	}
	return frontendOf(f, FrontendKey, key)
}
