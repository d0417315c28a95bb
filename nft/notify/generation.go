// SPDX-License-Identifier: Apache-2.0

package notify

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// generation is the number of a transaction of a network namespace. A notification also
// has the process that made it. An answer has the process that asked.
type generation struct {
	id, pid uint32
	process string
}

// generation asks for the number of the last transaction, by any software.
func (l *listener) generation() (id uint32, err error) {
	answers, err := l.asking.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, nfgenmsg),
	})
	var attributes *netlink.AttributeDecoder
	switch {
	case err != nil:
	case len(answers) != 1 || len(answers[0].Data) < nfgenmsg:
		err = errors.New("an unknown answer")
	default:
		attributes, err = netlink.NewAttributeDecoder(answers[0].Data[nfgenmsg:])
	}
	if err != nil {
		return 0, fmt.Errorf("count the transactions of nf_tables: %w", err)
	}
	return readGeneration(attributes).id, nil
}

func readGeneration(attributes *netlink.AttributeDecoder) (g generation) {
	attributes.ByteOrder = binary.BigEndian
	for attributes.Next() {
		switch attributes.Type() {
		case unix.NFTA_GEN_ID:
			g.id = attributes.Uint32()
		case unix.NFTA_GEN_PROC_PID:
			g.pid = attributes.Uint32()
		case unix.NFTA_GEN_PROC_NAME:
			g.process = attributes.String()
		}
	}
	return g
}
