// SPDX-License-Identifier: Apache-2.0

package notify

import (
	"encoding/binary"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Generations counts the transactions of a network namespace, by any software.
type Generations struct{ conn *netlink.Conn }

// Generation is the number of the last transaction, and the process that made it.
type Generation struct {
	ID, PID uint32
	Process string
}

// OpenGenerations opens a socket in the network namespace of the calling thread.
func OpenGenerations() (*Generations, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink to nf_tables: %w", err)
	}
	return &Generations{conn}, nil
}

// Close closes the socket.
func (g *Generations) Close() error { return g.conn.Close() }

// Last asks the kernel.
func (g *Generations) Last() (last Generation, err error) {
	answers, err := g.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, nfgenmsg),
	})
	if err != nil {
		return last, fmt.Errorf("count the transactions of nf_tables: %w", err)
	}
	for _, m := range answers {
		attributes, err := netlink.NewAttributeDecoder(m.Data[nfgenmsg:])
		if err != nil {
			return last, fmt.Errorf("count the transactions of nf_tables: %w", err)
		}
		last = readGeneration(attributes)
	}
	return last, nil
}

func readGeneration(attributes *netlink.AttributeDecoder) (g Generation) {
	attributes.ByteOrder = binary.BigEndian
	for attributes.Next() {
		switch attributes.Type() {
		case unix.NFTA_GEN_ID:
			g.ID = attributes.Uint32()
		case unix.NFTA_GEN_PROC_PID:
			g.PID = attributes.Uint32()
		case unix.NFTA_GEN_PROC_NAME:
			g.Process = attributes.String()
		}
	}
	return g
}
