// SPDX-License-Identifier: Apache-2.0

package nft_test

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"

	"signalbox/nft"
	"signalbox/nft/nfttest"
	"signalbox/proxier/plan"
)

// A table that drops what comes from a set of addresses, printed and written.
func Example() {
	const blocked nft.SetID = 0
	f := nft.FamilyOf(plan.IPv4)
	sets := []*nft.Set{nft.NewSet("blocked", []nft.Field{nft.AddrField}, nil, "who may not connect")}
	forward := nft.NewHook(nftables.ChainHookForward, *nftables.ChainPriorityFilter, "type filter hook forward priority filter")
	chains := []nft.Chain{nft.NewChain("filter", forward, nft.NewRule(nft.In(f.Saddr(), "blocked"), nft.Drop()))}
	element := nft.Element{Set: blocked, Key: string(nft.AppendAddr(nil, netip.MustParseAddr("192.0.2.1")))}
	fmt.Print(nft.RenderTable(f, "example", nil, sets, []nft.Element{element}, chains))

	var kernel nfttest.Kernel // without its Connection, Open connects to Linux
	table, err := nft.Open(f, "example", sets, kernel.Connection())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer table.Close()
	table.ReplaceTable()
	table.AddChains(chains)
	table.AddElements([]nft.Element{element})
	fmt.Println("first transaction:", table.Commit())

	table.RemoveElements([]nft.Element{element, element})
	fmt.Println("second transaction:", table.Commit())

	// Output:
	// table ip example {
	// 	set blocked {
	// 		type ipv4_addr
	// 		comment "who may not connect"
	// 		elements = { 192.0.2.1 }
	// 	}
	//
	// 	chain filter {
	// 		type filter hook forward priority filter; policy accept;
	// 		ip saddr @blocked drop
	// 	}
	//
	// }
	// first transaction: <nil>
	// second transaction: others changed the table: receive: NFT_MSG_DELSETELEM: netlink receive: no such file or directory
}
